"""Meta-training: tasks, unrolls, gradient estimators and the outer loop."""
