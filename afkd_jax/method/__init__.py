"""AFD and its relatives: ring, losses, discriminators, optimizers, state and step."""
