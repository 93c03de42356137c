"""Plain Shampoo, to compare with: no blocks, no grafting, dense preconditioners of small sides.

Reference: Gupta, Koren, Singer, "Shampoo", https://arxiv.org/abs/1802.09568, algorithm 2; the
inverse roots by the coupled Newton iteration of Anil et al., https://arxiv.org/abs/2002.09018.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ShampooState(NamedTuple):
    """Momentum, preconditioner statistics and their inverse roots."""

    count: jax.Array  # type: ignore[assignment]  # () int32
    momentum: Any  # like the params
    statistics: Any  # a tuple of (d, d) a leaf, one a preconditioned side
    roots: Any  # like statistics


def inverse_root(matrix: jax.Array, order: int, iterations: int = 30) -> jax.Array:
    """The power -1 / order of a symmetric positive definite matrix.

    Args:
      matrix: (d, d) float32.
      order: a positive integer.
      iterations: of the coupled Newton iteration; 30 reach float32's limit for condition numbers
        of about 1e6.

    Returns:
      (d, d) float32.
    """
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    # The norm bounds the largest eigenvalue; the iteration converges for those in (0, order + 1).
    factor = (1 + order) / (2 * jnp.linalg.norm(matrix))

    def body(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        power, root = carry
        step = ((order + 1) * identity - power) / order
        return jnp.linalg.matrix_power(step, order) @ power, root @ step

    start = (matrix * factor, identity * factor ** (1 / order))
    return jax.lax.fori_loop(0, iterations, body, start)[1]


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    epsilon: float = 1e-4,
    refresh_every: int = 20,
    max_dimension: int = 256,
) -> optax.GradientTransformation:
    """Shampoo with momentum.

    Args:
      learning_rate: a number or a schedule.
      momentum: of the preconditioned gradient.
      epsilon: times the identity, the statistics' start.
      refresh_every: steps between computations of the inverse roots.
      max_dimension: a longer side is not preconditioned.

    Returns:
      The transformation. Tensors of more than two axes are taken as matrices: all axes but the last
      together.
    """

    def as_matrix(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1]) if x.ndim >= 2 else x.reshape(-1)

    def sides(x: jax.Array) -> list[int]:
        shape = as_matrix(x).shape
        return [axis for axis, size in enumerate(shape) if 1 < size <= max_dimension]

    def start(x: jax.Array, scale: float) -> tuple[jax.Array, ...]:
        shape = as_matrix(x).shape
        return tuple(scale * jnp.eye(shape[axis], dtype=jnp.float32) for axis in sides(x))

    def init(params: optax.Params) -> ShampooState:
        return ShampooState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda x: start(x, epsilon), params),
            jax.tree.map(lambda x: start(x, 1.0), params),
        )

    def update(
        gradients: optax.Updates, state: ShampooState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ShampooState]:
        del params
        leaves, structure = jax.tree.flatten(gradients)
        old = structure.flatten_up_to(state.statistics)
        statistics = []
        for gradient, matrices in zip(leaves, old, strict=True):
            g = as_matrix(gradient)
            outer = [
                jnp.tensordot(g, g, axes=[[a for a in range(g.ndim) if a != axis]] * 2)
                for axis in sides(gradient)
            ]
            statistics.append(tuple(m + o for m, o in zip(matrices, outer, strict=True)))

        def refresh() -> list[tuple[jax.Array, ...]]:
            return [
                tuple(inverse_root(m, 2 * len(as_matrix(g).shape)) for m in matrices)
                for g, matrices in zip(leaves, statistics, strict=True)
            ]

        kept = structure.flatten_up_to(state.roots)
        roots = jax.lax.cond(state.count % refresh_every == 0, refresh, lambda: kept)
        directions = []
        for gradient, matrices in zip(leaves, roots, strict=True):
            g = as_matrix(gradient)
            for axis, root in zip(sides(gradient), matrices, strict=True):
                g = jnp.moveaxis(jnp.tensordot(root, g, axes=[[1], [axis]]), 0, axis)
            directions.append(g.reshape(gradient.shape))
        moved = jax.tree.map(
            lambda m, d: momentum * m + d, state.momentum, structure.unflatten(directions)
        )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        updates = jax.tree.map(lambda m: -rate * m, moved)
        return updates, ShampooState(
            state.count + 1, moved, structure.unflatten(statistics), structure.unflatten(roots)
        )

    return optax.GradientTransformation(init, update)
