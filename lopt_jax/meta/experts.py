"""Optimizers that guide a learned one during meta-training, by name.

Reference: https://arxiv.org/abs/2607.06772 (ELO).
"""

import jax
import jax.numpy as jnp
import optax

from lopt_jax.meta.unroll import Guidance

# Inner steps over which an expert's rate falls along half a cosine, and to which part of its peak.
_STEPS, _LAST = 10_000, 0.01
_MUON_ADAM = 0.3  # Muon's Adam, for what is no matrix, has this part of its rate


def make_expert(name: str, learning_rate: float) -> optax.GradientTransformation:
    """An expert with the schedule of the reference.

    Args:
      name: of `EXPERTS`.
      learning_rate: at the first inner step; it falls to a hundredth over 10,000.

    Returns:
      The transformation. Any other one serves as well: see `trainer.Trainer`.
    """
    return EXPERTS[name](optax.cosine_decay_schedule(learning_rate, _STEPS, _LAST))


EXPERTS = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.0),
    "muon": lambda rate: optax.contrib.muon(
        rate, adam_learning_rate=lambda step: _MUON_ADAM * rate(step)
    ),
    "sgdm": lambda rate: optax.sgd(rate, momentum=0.9),
}


def guidance_at(
    step: jax.Array | int,
    until: int,
    gone: int,
    direction: tuple[float, float],
    size: tuple[float, float],
) -> Guidance:
    """How much an expert counts at an outer step.

    Args:
      step: the outer step.
      until: it has the whole weight up to this step.
      gone: it has none from this step on; in between, everything falls linearly.
      direction: weights of the imitation of directions at the start and in the end.
      size: the same, of sizes.

    Returns:
      The guidance, float32 scalars.
    """
    fraction = jnp.clip((step - until) / max(gone - until, 1), 0.0, 1.0).astype(jnp.float32)

    def between(ends: tuple[float, float]) -> jax.Array:
        return ends[0] + (ends[1] - ends[0]) * fraction

    return Guidance(between((1.0, 0.0)), between(direction), between(size))
