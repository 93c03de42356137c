"""What a set of weights says about the settings that it should be used with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt_jax.partition import say_once
from lopt_jax.weights.base import Weights, one_line


def mention_recommended(
    optimizer: str, weights: Weights, settings: Mapping[str, tuple[Any, Any]]
) -> None:
    """Logs once what weights recommend, where an optimizer is left at its defaults.

    Nothing is set: what is best depends on the model and on the length of the training, too.

    Args:
      optimizer: the constructor's name.
      weights: the weights; their `metadata["recommended"]` is read, if there is one.
      settings: argument -> (its value, its default).
    """
    recommended = weights.metadata.get("recommended")
    if not isinstance(recommended, Mapping):
        return
    shared = {name: pair for name, pair in settings.items() if name in recommended}
    left = all(
        isinstance(value, int | float) and value == default for value, default in shared.values()
    )
    if left and any(recommended[name] != default for name, (_, default) in shared.items()):
        defaults = {name: default for name, (_, default) in shared.items()}
        say_once(
            f"{optimizer}: left at {one_line(defaults)}; its weights recommend "
            f"{_recommendation(recommended)}."
        )


def _recommendation(recommended: Mapping[str, Any]) -> str:
    """The settings, and in brackets how they were chosen where that is said."""
    settings = {name: value for name, value in recommended.items() if name != "chosen"}
    chosen = f" (chosen {one_line(recommended['chosen'])})" if "chosen" in recommended else ""
    return one_line(settings) + chosen
