"""Training: a config on its devices, the loop, evaluation, resuming, health checks."""
