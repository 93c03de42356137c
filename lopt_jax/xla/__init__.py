"""The rule on XLA: how its network runs, and how many tensors take the passes of a step."""
