"""Values against their annotations: wrong settings are named before anything is compiled."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lopt_jax.brief import brief


def check_fields(settings: Any) -> None:
    """Checks the type of every field of a dataclass instance.

    Args:
      settings: the instance.

    Raises:
      TypeError: for a value of another type than the field's annotation.
      ValueError: for a number that is not finite, an unknown choice, or a wrong number of values.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        check_value(field.name, getattr(settings, field.name), hints[field.name])


def did_you_mean(value: Any, choices: Iterable[Any]) -> str:
    """The end of a message about a text that is none of the choices; "" where none is close."""
    names = [choice for choice in choices if isinstance(choice, str)]
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f". Did you mean {close[0]!r}?" if close else ""


def check_value(name: str, value: Any, hint: Any) -> None:
    """Checks one value, and what it holds.

    Args:
      name: for the message.
      value: the value.
      hint: Any, a class, a Literal, a tuple of these, or one of these and None; a float may be an
        int, a tuple a list.

    Raises:
      TypeError: for a value of another type.
      ValueError: for a number that is not finite, an unknown choice, or a wrong number of values.
    """
    inner = typing.get_args(hint)
    if hint is Any or (value is None and types.NoneType in inner):
        return
    match typing.get_origin(hint):
        case types.UnionType:
            check_value(name, value, inner[0])
        case kind if kind is Literal:
            if value not in inner:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(str, inner))}; found {brief(value)}"
                    f"{did_you_mean(value, inner)}"
                )
        case kind if kind is tuple:
            _check_items(name, value, inner)
        case _:
            _check_plain(name, value, hint)


def _check_items(name: str, values: Any, hints: tuple[Any, ...]) -> None:
    if not isinstance(values, tuple | list):
        raise TypeError(f"{name}: expected a list in brackets, found {brief(values)}")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(values)
    if len(values) != len(hints):
        raise ValueError(f"{name}: expected {len(hints)} values, found {brief(values)}")
    for i, (value, hint) in enumerate(zip(values, hints, strict=True)):
        check_value(f"{name}[{i}]", value, hint)


def _check_plain(name: str, value: Any, kind: type) -> None:
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        names = {float: "a number", int: "an integer", str: "a text"}
        raise TypeError(f"{name}: expected {names.get(kind, kind.__name__)}, found {brief(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, found {value}")


def check_bounds(settings: Any, least: Mapping[str, float], above_zero: tuple[str, ...]) -> None:
    """Checks the size of numbers among the fields of a dataclass instance.

    Args:
      settings: the instance.
      least: the smallest allowed value by field.
      above_zero: fields that have to be above zero.

    Raises:
      ValueError: for a number that is too small.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value < bound:
            raise ValueError(f"{name}: expected at least {bound}, found {value}")
    for name in above_zero:
        value = getattr(settings, name)
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, found {value}")
