"""Online adversarial feature-map distillation (AFD) in JAX."""
