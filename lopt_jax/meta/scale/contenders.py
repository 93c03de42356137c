"""The optimizers of the scale suite: the usual ones with their grids, and learned ones.

The usual ones have what people give them: gradients clipped to norm one, 5% warm-up, a cosine to
zero, decay 0.1; Muon's embeddings and heads go to its AdamW.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.meta.scale.run import Build
from lopt_jax.meta.scale.tasks import stacked_axes
from lopt_jax.optimizers.lopt import Recipe, lopt
from lopt_jax.optimizers.plans import names_of
from lopt_jax.weights import load_weights

_WARM_UP = 0.05
_WEIGHT_DECAY = 0.1
_CONSISTENT_RMS = 0.2
ADAM_LEAVES = ("embedding", "positions", "position", "head")


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer and what it may choose from.

    Attributes:
      name: for tables.
      build: from a setting's numbers and the number of steps to the optimizer.
      settings: the numbers of every setting that is tried; one setting where nothing is tuned.
      widen: the number whose grid grows where the best lies at its end; "" where none.
      version: says what the optimizer is, where that may change; "" where it does not.
    """

    name: str
    build: Build
    settings: tuple[Mapping[str, float], ...]
    widen: str = ""
    version: Callable[[], str] = str


def warm_cosine(rate: jax.Array, horizon: jax.Array) -> optax.Schedule:
    """Linear warm-up over 5% of the steps, then half a cosine to zero."""

    def schedule(count: jax.Array) -> jax.Array:
        warm = jnp.maximum(_WARM_UP * horizon, 1.0)
        progress = jnp.clip((count - warm) / jnp.maximum(horizon - warm, 1.0), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return rate * jnp.minimum((count + 1) / warm, cosine)

    return schedule


def _rates(low: float, ratio: float, count: int) -> tuple[dict[str, float], ...]:
    return tuple({"rate": low * ratio**i} for i in range(count))


def _adamw(settings: Mapping[str, jax.Array], horizon: jax.Array) -> Any:
    schedule = warm_cosine(settings["rate"], horizon)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=_WEIGHT_DECAY),
    )


def _matrices(params: Any) -> Any:
    """Muon's dimension numbers: matrices of hidden layers, convolutions as (fan in, out)."""

    def numbers(path: Any, leaf: Any) -> Any:
        stack = stacked_axes(path, leaf)
        if leaf.ndim - stack < 2 or any(name in ADAM_LEAVES for name in names_of(path)):
            return None
        axes = range(stack, leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(axes[:-1]), (leaf.ndim - 1,))

    return jax.tree_util.tree_map_with_path(numbers, params)


def _muon(settings: Mapping[str, jax.Array], horizon: jax.Array) -> Any:
    schedule = warm_cosine(settings["rate"], horizon)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            weight_decay=_WEIGHT_DECAY,
            adam_b2=0.95,
            adam_weight_decay=_WEIGHT_DECAY,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=_CONSISTENT_RMS,
        ),
    )


ADAMW = Contender("adamw", _adamw, _rates(0.5e-3, 2.0, 5), "rate")
MUON = Contender("muon", _muon, _rates(2e-3, 1.8, 5), "rate")


def _lopt(weights: str) -> Build:
    def build(settings: Mapping[str, jax.Array], horizon: jax.Array) -> Any:
        return lopt(horizon, weights, learning_rate=settings["rate"], stacked_axes=stacked_axes)

    return build


def _version(weights: str) -> Callable[[], str]:
    """A digest of what `lopt` is with these weights: records of another one are not its own."""

    @functools.cache
    def version() -> str:
        leaves = jax.tree.leaves(load_weights(weights).params)
        content = repr(Recipe()).encode() + b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
        return hashlib.sha256(content).hexdigest()[:12]

    return version


_UNTUNED = ({"rate": 1.0},)
LOPT = Contender("lopt", _lopt("lopt"), _UNTUNED, version=_version("lopt"))
LOPT_CELO2 = Contender(
    "lopt_celo2_small", _lopt("celo2_small"), _UNTUNED, version=_version("celo2_small")
)
# what multiples of its rate would have given: the recipe is right where none of them is better
MULTIPLES = tuple({"rate": rate} for rate in (0.5, 0.7, 1.4, 2.0))

CONTENDERS = {contender.name: contender for contender in (LOPT, LOPT_CELO2, ADAMW, MUON)}
