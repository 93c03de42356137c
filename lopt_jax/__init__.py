"""Learned optimizers for JAX, as optax transformations."""
