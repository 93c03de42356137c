"""The optimizers, one a file."""
