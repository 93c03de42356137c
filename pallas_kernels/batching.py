"""`jax.vmap` of the two calls: a batch of tensors is so many more tensors.

The kernels take any number of tensors, each with a network of its own, so nothing in them knows of
batches. What the tensors of one call share differs from one call of the batch to the next, and
becomes every tensor's own.
"""

import functools
import itertools
from collections.abc import Callable
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


def over_tensors(function: Callable[..., tuple[list, Any]]) -> Callable[..., tuple[list, Any]]:
    """Makes a function of tensors one that `jax.vmap` takes.

    Args:
      function: (parts, *others) -> (list of trees, one a part, or empty; tree). Parts are trees of
        arrays with a leading axis of tensors. The others are such trees for the tensors of all
        parts, or `Shared`. The last result has that axis for the tensors of all parts as well.

    Returns:
      The function.
    """
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def batched(size: int, is_batched: Any, parts: Any, *others: Any) -> Any:
        def fill(is_batched: bool, x: jax.Array) -> jax.Array:
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape((-1, *x.shape[2:]))

        filled = [jax.tree.map(fill, b, part) for b, part in zip(is_batched[0], parts, strict=True)]
        ends = list(itertools.accumulate(jax.tree.leaves(part)[0].shape[1] for part in filled))
        joined = jax.tree.map(lambda *xs: flat(jnp.concatenate(xs, axis=1)), *filled)

        def every(b: Any, other: Any) -> Any:
            if not isinstance(other, Shared):
                return jax.tree.map(lambda b, x: flat(fill(b, x)), b, other)
            if not other.per_tensor and not any(jax.tree.leaves(b)):
                return other
            tree = jax.tree.map(fill, b.tree, other.tree)
            own = (
                flat
                if other.per_tensor
                else functools.partial(jnp.repeat, repeats=ends[-1], axis=0)
            )
            return Shared(jax.tree.map(own, tree), True)

        pairs = zip(is_batched[1:], others, strict=True)
        by_part, by_tensor = over_tensors(function)((joined,), *(every(*pair) for pair in pairs))
        unflat = lambda x: x.reshape((size, -1, *x.shape[1:]))  # noqa: E731
        by_part, by_tensor = jax.tree.map(unflat, (by_part, by_tensor))
        if by_part:
            rows = map(slice, (0, *ends), ends)
            by_part = [jax.tree.map(lambda x, r=r: x[:, r], by_part[0]) for r in rows]
        out = by_part, by_tensor
        return out, jax.tree.map(lambda _: True, out)

    return run
