"""`jax.vmap` of the two calls: a batch of tensors is so many more tensors.

The kernels take any number of tensors, each with a network of its own, so nothing in them knows of
batches. What the tensors of one call share differs from one call of the batch to the next, and
becomes every tensor's own.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_pytree_node_class
class Shared:
    """What tensors share, or, with a leading axis of tensors, what each of them has."""

    def __init__(self, tree: Any, per_tensor: bool):
        self.tree, self.per_tensor = tree, per_tensor

    def __iter__(self) -> Any:
        return iter((self.tree, self.per_tensor))

    def tree_flatten(self) -> tuple[tuple[Any], bool]:
        """The arrays, and whether they have the axis."""
        return (self.tree,), self.per_tensor

    @classmethod
    def tree_unflatten(cls, per_tensor: bool, children: tuple[Any]) -> "Shared":
        """The inverse of `tree_flatten`."""
        return cls(children[0], per_tensor)


def over_tensors(
    function: Callable[..., tuple[list[list], list, Any]],
) -> Callable[..., tuple[list[list], list, Any]]:
    """Makes a function of tensors one that `jax.vmap` takes.

    Args:
      function: (units, by unit, by tensor, *others) -> (list of trees, one a part, of each unit;
        list of trees, one a unit; tree). A unit is a list of parts. Parts and what is by unit are
        trees of arrays with a leading axis of tensors, of the part or the unit; trees by tensor
        have that axis for the tensors of all units. The others are `Shared`, for these as well.

    Returns:
      The function.
    """
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def batched(
        size: int, is_batched: Any, units: Any, by_unit: Any, by_tensor: Any, *others: Any
    ) -> Any:
        def fill(is_batched: bool, x: jax.Array) -> jax.Array:
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape((-1, *x.shape[2:]))

        def unflat(x: jax.Array) -> jax.Array:
            return x.reshape((size, -1, *x.shape[1:]))

        filled = [
            [jax.tree.map(fill, b, part) for b, part in zip(flags, parts, strict=True)]
            for flags, parts in zip(is_batched[0], units, strict=True)
        ]
        sizes = [[jax.tree.leaves(part)[0].shape[1] for part in parts] for parts in filled]
        joined = [
            [jax.tree.map(lambda *xs: flat(jnp.concatenate(xs, axis=1)), *parts)]
            for parts in filled
        ]
        counts = [sum(parts) for parts in sizes]
        bounds = list(itertools.accumulate(counts[:-1]))

        def flat_by_tensor(x: jax.Array) -> jax.Array:
            return jnp.concatenate([flat(part) for part in jnp.split(x, bounds, axis=1)])

        def unflat_by_tensor(x: jax.Array) -> jax.Array:
            parts = jnp.split(x, [size * n for n in bounds])
            return jnp.concatenate([unflat(part) for part in parts], axis=1)

        def own(b: Any, other: Shared) -> Shared:
            if not other.per_tensor and not any(jax.tree.leaves(b)):
                return other

            def of_all(x: jax.Array) -> jax.Array:
                if other.per_tensor:
                    return flat_by_tensor(x)
                return jnp.concatenate([jnp.repeat(x, n, axis=0) for n in counts])

            tree = jax.tree.map(fill, b.tree, other.tree)
            return Shared(jax.tree.map(of_all, tree), True)

        by_part, of_units, of_tensors = over_tensors(function)(
            joined,
            jax.tree.map(lambda b, x: flat(fill(b, x)), is_batched[1], by_unit),
            jax.tree.map(lambda b, x: flat_by_tensor(fill(b, x)), is_batched[2], by_tensor),
            *(own(*pair) for pair in zip(is_batched[3:], others, strict=True)),
        )

        def rows_of(trees: list, parts: Sequence[int]) -> list:
            if not trees:
                return trees
            ends = list(itertools.accumulate(parts))
            rows = map(slice, (0, *ends), ends)
            return [jax.tree.map(lambda x, r=r: unflat(x)[:, r], trees[0]) for r in rows]

        out = (
            [rows_of(trees, parts) for trees, parts in zip(by_part, sizes, strict=True)],
            jax.tree.map(unflat, of_units),
            jax.tree.map(unflat_by_tensor, of_tensors),
        )
        return out, jax.tree.map(lambda _: True, out)

    return run
