"""Where each array of the canonical layout lies in a tree of the original code.

References: `init` of NNAdam (learned_optimizers/nn_adam.py), RNNMLPLOpt (rnn_mlp_lopt.py), MLPLOpt
(mlp_lopt.py), LearnableSGD and its like (base.py), AdafacMLPLOpt (adafac_mlp_lopt.py) and HyperV2
(research/general_lopt/hyper_v2.py) in google/learned_optimization; celo/optimizers/*.py in
amoudgl/celo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lopt_jax.brief import brief
from lopt_jax.weights.base import weights_error

Path = tuple[str, ...]


class Field(NamedTuple):
    """One array, in our layout and in the original's."""

    ours: Path
    theirs: Path
    is_row: bool = False  # there it has a leading axis of size one


def _linear(ours: Path, theirs: Path) -> tuple[Field, ...]:
    return tuple(Field((*ours, key), (*theirs, key)) for key in ("w", "b"))


def _lstm() -> tuple[Field, ...]:
    state = (
        Field(("lstm", f"initial_{key}"), ("lstm_init_state", key), is_row=True)
        for key in ("hidden", "cell")
    )
    return (*state, *_linear(("lstm",), ("rnn_params", "rnn/linear")))


def _same(*names: str) -> tuple[Field, ...]:
    return tuple(Field((name,), (name,)) for name in names)


# `linear`, the first mixing layer of HyperV2, is computed and discarded there: it is left out.
_SCHEDULER = (
    *_lstm(),
    *_linear(("mix",), ("rnn_params", "linear_1")),
    *_linear(("input",), ("rnn_params", "linear_2")),
    *_linear(("step_size",), ("rnn_params", "step_size")),
)
_HYPER = (*_SCHEDULER, *_linear(("controls",), ("rnn_params", "rnn_to_controls")))
_DECAYS = _same("momentum_decays", "rms_decays", "adafactor_decays")

# Beside the networks of layers, which follow.
FIELDS: Mapping[str, tuple[Field, ...]] = {
    "velo": _HYPER,
    "celo": _HYPER,
    "celo_adam": _SCHEDULER,
    "celo2": (),
    "elo_celo2": (),
    "small_fc_lopt": _DECAYS,
    "mulo": _DECAYS,
    "elo": (),
    "mlp_lopt": (),
    "nn_adam": (
        *_lstm(),
        *_linear(("controls",), ("rnn_to_controls_params", "rnn_to_controls")),
        Field(("initial", "learning_rate"), ("per_layer_lr",)),
        Field(("initial", "beta1"), ("per_layer_beta1",)),
        Field(("initial", "beta2"), ("per_layer_beta2",)),
        Field(("initial", "epsilon"), ("per_layer_epsilon",)),
    ),
    "rnn_mlp_lopt": (
        *_lstm(),
        *_linear(("to_mlp",), ("rnn_to_ff_params", "rnn_to_ff")),
        *_linear(("to_lstm",), ("rnn_to_in_params", "rnn_to_in")),
        *_same("initial_from_mlp", "initial_from_lstm"),
    ),
    "learnable_sgd": _same("log_lr"),
    "learnable_sgdm": _same("log_lr", "one_minus_momentum"),
    "learnable_adam": _same("log_lr", "one_minus_beta1", "one_minus_beta2", "log_epsilon"),
}

# The network of an architecture: where its layers lie; Haiku's own module has layers w0, b0, ...,
# `hk.nets.MLP` modules with w and b.
OWN_MODULE: Mapping[str, Path] = {
    **dict.fromkeys(("velo", "celo", "celo2", "elo_celo2"), ("ff_mod_stack", "~")),
    **dict.fromkeys(("small_fc_lopt", "mulo", "elo"), ("nn", "~")),
}
MODULES: Mapping[str, Path] = {"mlp_lopt": (), "rnn_mlp_lopt": ("ffmod_params",)}
MODULE = "mlp/~/linear_"  # what Haiku names the layers of a plain MLP
# Widths of the groups of features whose rows of a first layer are arrays of their own, in
# `ff_mod_stack` there and in PyLO (CELO2_FEATURE_DIMS).
FEATURE_GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
# The argument of AdafacMLPLOpt with which every weight is a scalar of its own; in the metadata of
# weights that came so.
SEPARATE_WEIGHTS = "make_separate_weights"


def member(tree: Any, path: Sequence[str], source: object) -> Any:
    """What lies at a path of an original tree.

    Raises:
      WeightsError: there is nothing.
    """
    for i, key in enumerate(path):
        if not isinstance(tree, Mapping) or key not in tree:
            found = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
            name = "/".join(path[:i]) or "the meta-parameters"
            raise weights_error(source, expected=f"{name} with {key!r}", found=brief(found))
        tree = tree[key]
    return tree


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Puts a value at a path of nested dicts."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def read_fields(fields: Iterable[Field], tree: Any, source: object) -> dict[str, Any]:
    """The canonical tree of fields of an original one.

    Raises:
      WeightsError: an array is missing.
    """
    out: dict[str, Any] = {}
    for field in fields:
        array = member(tree, field.theirs, source)
        if field.is_row and np.ndim(array) == 2 and np.shape(array)[0] == 1:
            array = array[0]  # another shape fails validation
        put(out, field.ours, array)
    return out


def write_fields(fields: Iterable[Field], params: Mapping[str, Any], tree: dict[str, Any]) -> None:
    """Puts the arrays of fields into an original tree; the inverse of `read_fields`."""
    for field in fields:
        array = np.asarray(member(params, field.ours, "weights"))
        put(tree, field.theirs, array[None] if field.is_row else array)
