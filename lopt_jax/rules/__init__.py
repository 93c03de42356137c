"""What is computed on one tensor or on a batch of matrices, in plain jnp, whatever the platform."""
