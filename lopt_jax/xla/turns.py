"""The same computation for many trees of large arrays, compiled once and without joining them.

A loop needs arrays that it can index, and joining large ones copies all of them at once. Here a
loop's step picks its arrays out of a list by branches that do nothing else: one tree's arrays are
copied in and out at a time, and compilers see the computation once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

STORED_AT_ONCE = 9


def in_turn(
    function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree, Tree]],
    read: Sequence[Tree],
    state: Sequence[Tree],
    out: Sequence[Tree],
    small: Tree,
) -> tuple[list[Tree], list[Tree], Tree]:
    """Calls a function for one element of each list after another.

    Args:
      function: (read, state, small) -> (new state, out, small results).
      read: for every turn a tree of arrays; all have the same structure, shapes and dtypes, as in
        the following two.
      state: for every turn what it replaces.
      out: for every turn arrays like the outputs, whose values are not read: they are written over.
      small: arrays with a leading axis of turns; these are joined.

    Returns:
      The new states, the outputs, and the small results with a leading axis of turns.
    """
    turns = range(len(read))

    def turn(written: tuple[list[Tree], list[Tree]], xs: tuple[jax.Array, Tree]) -> Any:
        i, of_turn = xs
        pick = [lambda state, k=k: (read[k], state[k]) for k in turns]
        of_read, of_state = jax.lax.switch(i, pick, written[0])
        new_state, new_out, results = function(of_read, of_state, of_turn)

        pairs = list(zip(*written, strict=True))
        return tuple(map(list, zip(*_stored(i, pairs, (new_state, new_out)), strict=True))), results

    lists = (list(state), list(out))
    (new_state, new_out), results = jax.lax.scan(turn, lists, (jnp.arange(len(read)), small))
    return new_state, new_out, results


def _stored(i: jax.Array, items: Sequence[Tree], new: Tree) -> list[Tree]:
    """The items with a new one at a place.

    A branch for each place hands on all other items: compilers take time that grows with the
    square of their number, so a few places at a time.
    """
    out: list[Tree] = []
    for first in range(0, len(items), STORED_AT_ONCE):
        some = list(items[first : first + STORED_AT_ONCE])
        store = [lambda old, x, k=k: [*old[:k], x, *old[k + 1 :]] for k in range(len(some))]
        inside = (i >= first) & (i < first + len(some))
        branch = jnp.where(inside, i - first, len(some))
        out += jax.lax.switch(branch, [*store, lambda old, _: old], some, new)
    return out
