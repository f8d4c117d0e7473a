"""Checkpoints: one run at one step on disk, and the workdir they lie in."""
