"""`Weights`: the meta-parameters of one learned optimizer, with what is needed to run them."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lopt_jax.brief import brief


class WeightsError(ValueError):
    """A weights file, or a `Weights`, is not what it has to be.

    The message says which file, what was expected, what was found, and what to do.
    """


def weights_error(source: object, *, expected: str, found: str, advice: str = "") -> WeightsError:
    """Returns a `WeightsError` whose message has the same four parts everywhere.

    Args:
      source: the file, the address, or the name of the argument.
      expected: what a valid file has there.
      found: what this one has.
      advice: what the user can do, one sentence; may be empty.
    """
    message = f"{source}: expected {expected}, found {found}."
    return WeightsError(printable(f"{message} {advice}" if advice else message))


def printable(text: str) -> str:
    """Returns one line of text with escapes in place of what would steer a terminal.

    Args:
      text: anything, also what a file of a stranger says: control characters, newlines,
        characters that reverse the direction, halves of surrogate pairs.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


_SHOWN = 800  # characters of one value that is shown
_MAX_NESTING = 64  # of config and metadata: far from the depth at which Python's recursion ends


def _freeze(value: Any, depth: int) -> Any:
    """Makes a JSON-like value immutable and hashable."""
    if depth > _MAX_NESTING:
        raise ValueError(f"config and metadata are nested at most {_MAX_NESTING} deep")
    if isinstance(value, StaticMapping) or value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return StaticMapping(value, depth)
    if isinstance(value, list | tuple):
        return tuple(_freeze(item, depth + 1) for item in value)
    raise TypeError(
        "config and metadata hold only None, bool, int, float, str, sequences and mappings of "
        f"them, found {type(value).__name__}"
    )


class StaticMapping(Mapping[str, Any]):
    """An immutable, hashable mapping of JSON-like values: static data of a pytree.

    Values become hashable on the way in: lists become tuples, inner mappings `StaticMapping`
    (which are built with the depth at which they lie).

    Raises:
      TypeError: a key is not a string, or a value is not JSON-like.
      ValueError: values are nested too deep.
    """

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[str, Any] | None = None, depth: int = 0):
        if not isinstance(items, Mapping | None):
            raise TypeError(
                f"config and metadata are mappings of names to values, found {brief(items)}"
            )
        frozen = {}
        for key, value in (items or {}).items():
            if not isinstance(key, str):
                raise TypeError(f"the keys of config and metadata are strings, found {key!r}")
            frozen[key] = _freeze(value, depth + 1)
        self._items: dict[str, Any] = frozen
        self._hash: int | None = None

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StaticMapping):
            return self._items == other._items
        if isinstance(other, Mapping):
            try:
                return self._items == StaticMapping(other)._items
            except TypeError:
                return False
        return NotImplemented

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._items.items()))
        return self._hash

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[Any, ...]:
        return StaticMapping, (self._items,)


def thaw(value: Any) -> Any:
    """Returns plain dicts and lists, as JSON wants them, of a frozen value."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [thaw(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Weights:
    """The meta-parameters of one learned optimizer.

    A pytree: `params` are its leaves, everything else is static. So an optimizer can be built
    inside `jit`, `vmap` or `grad` over its own weights, as meta-training does. Building a
    `Weights` checks nothing about `params` (they may be tracers); see
    `lopt_jax.weights.schema.validate`.

    Attributes:
      architecture: the rule that the meta-parameters belong to, for example "small_fc_lopt".
      config: what the arrays do not say: sizes, decays, multipliers, flags. Immutable.
      params: nested dict of float32 arrays, the meta-parameters (theta in the literature).
      metadata: where the weights come from: source, licence, sha256, meta-training record.
    """

    architecture: str
    config: Mapping[str, Any]
    params: Any
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=StaticMapping)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", StaticMapping(self.config))
        object.__setattr__(self, "metadata", StaticMapping(self.metadata))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weights):
            return NotImplemented
        mine, my_tree = jax.tree.flatten(self)
        theirs, their_tree = jax.tree.flatten(other)
        return bool(my_tree == their_tree) and all(map(_same_leaf, mine, theirs))  # type: ignore[operator]

    def __hash__(self) -> int:
        return hash((self.architecture, self.config, self.metadata))

    def __repr__(self) -> str:
        lines = [f"<{self._title()}", *(f"  {name}: {text}" for name, text in self._rows())]
        return "\n".join(lines) + ">"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align: left'>{html.escape(name)}</th>"
            f"<td style='text-align: left'>{html.escape(text)}</td></tr>"
            for name, text in self._rows()
        )
        return f"<table><caption>{html.escape(self._title())}</caption>{rows}</table>"

    def _title(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(int(np.prod(np.shape(leaf))) for leaf in leaves)
        name = printable(str(self.architecture))[:_SHOWN]
        return f"lopt_jax.Weights of {name}: {len(leaves)} arrays, {count:,} numbers"

    def _rows(self) -> list[tuple[str, str]]:
        """What a person wants to know first: (name, one printable line), absent ones left out."""
        values = {key: self.metadata.get(key) for key in _ROWS} | {"config": self.config}
        return [(key, one_line(value)) for key, value in values.items() if value]


_ROWS = ("about", "source", "licence", "recommended")  # of the metadata


def one_line(value: Any) -> str:
    """Returns a value of config or metadata as settings, in one printable line of bounded length.

    Args:
      value: a mapping becomes key=value, key=value.
    """
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}={_setting(item)}" for key, item in value.items())
    else:
        text = value if isinstance(value, str) else brief(value)
    text = printable(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False  # a traced value has no value yet to compare
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _setting(value: Any) -> str:
    return repr(value[:_SHOWN]) if isinstance(value, str) else brief(value)


WeightsLike = str | os.PathLike[str] | Weights
"""What constructors take: a registered name, a path, an address, or the weights themselves."""


def _flatten_with_keys(weights: Weights) -> tuple[Any, Any]:
    static = (weights.architecture, weights.config, weights.metadata)
    return ((jax.tree_util.GetAttrKey("params"), weights.params),), static


def _flatten(weights: Weights) -> tuple[Any, Any]:
    return (weights.params,), (weights.architecture, weights.config, weights.metadata)


def _unflatten(static: Any, children: Any) -> Weights:
    # Without __init__: JAX unflattens with tracers, None and placeholder objects as leaves.
    weights = object.__new__(Weights)
    for name, value in zip(("architecture", "config", "metadata"), static, strict=True):
        object.__setattr__(weights, name, value)
    object.__setattr__(weights, "params", children[0])
    return weights


jax.tree_util.register_pytree_with_keys(Weights, _flatten_with_keys, _unflatten, _flatten)
