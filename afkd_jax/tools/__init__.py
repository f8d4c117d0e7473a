"""Tools: one module per mode other than training."""
