"""`lopt_jax.rules.rule` under its earlier name, where pickled states look for their classes."""

from lopt_jax.rules.rule import MLP, AccumulatorStatistics, Rule

Statistics = AccumulatorStatistics

__all__ = ["MLP", "AccumulatorStatistics", "Rule", "Statistics"]
