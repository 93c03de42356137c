"""What the optimizers share: arguments, learning rate, weight decay, required inputs."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src.base import NO_PARAMS_MSG

from lopt_jax.accumulators import Accumulators, SecondMoments
from lopt_jax.applying import LearnedTransformation, apply_of
from lopt_jax.backends import BACKENDS
from lopt_jax.brief import brief
from lopt_jax.context import (
    LARGEST_INDEX,
    Steered,
    Tracing,
    is_traced,
    platform_of,
    platform_of_mesh,
    usual_promotion,
)
from lopt_jax.partition import mesh_of, say_once, varying_axes
from lopt_jax.stacks import say_stacks
from lopt_jax.tensors import (
    IN_STATIC_ARGS,
    StackedAxes,
    check_numpy,
    check_params,
    gradients_like,
    has_values,
    leaves_like,
    numbers_of,
    partitions_of_leaves,
    prefix_of_params,
    tensors_of,
)

GRADIENT_CLIP = 1000.0  # of every element, where the original clips

ScalarOrSchedule = float | jax.Array | Callable[[jax.Array], Any]


def check_number(name: str, value: Any, is_finite: bool = False) -> None:
    """Raises TypeError or ValueError, naming the argument, unless it is a number >= 0.

    Args:
      name: the argument.
      value: a Python or numpy number, or an array of one; one without a value yet may be any.
      is_finite: whether infinity is refused.
    """
    if isinstance(value, jax.Array | np.ndarray):
        check_array(name, value)
        if not has_value(value):
            return
        value = value.item()
    if isinstance(value, bool | np.bool_ | np.complexfloating) or not hasattr(value, "__float__"):
        raise TypeError(
            f"{name}: expected a number, found {brief(value)} of type {type(value).__name__}."
        )
    if not value >= 0 or (is_finite and value > float(np.finfo(np.float32).max)):
        kind = "a finite number" if is_finite else "a number"
        raise ValueError(f"{name}: expected {kind} >= 0, found {brief(value)}.")


def check_array(name: str, value: jax.Array | np.ndarray) -> None:
    """Raises TypeError or ValueError, naming the argument, unless it has one real number."""
    kinds = (np.integer, np.floating)
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        raise TypeError(f"{name}: expected a real number, found {value.dtype.name}.")
    if value.size != 1:
        raise ValueError(f"{name}: expected a number; found shape {value.shape}.")


def has_value(value: Any) -> bool:
    """Whether a number can be read: it is no array that is traced, or that other hosts hold."""
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def check_decays(name: str, values: Any, count: int) -> None:
    """Raises TypeError or ValueError unless there are so many numbers in [0, 1), or traced ones."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise TypeError(f"{name}: expected {count} numbers in [0, 1), found {brief(values)}.")
    for value in values:
        check_number(name, value)
        if has_value(value) and value >= 1:
            raise ValueError(f"{name}: expected numbers in [0, 1), found {brief(value)}.")


def check_learning_rate(learning_rate: Any) -> None:
    """Raises TypeError or ValueError unless it is a number >= 0 or a schedule."""
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, is_finite=True)


def check_dtype(dtype: Any) -> jnp.dtype:
    """The accumulator dtype as jax has it, or a TypeError naming the argument."""
    try:
        out = None if dtype is None else jnp.dtype(dtype)  # None is numpy's for float64
    except TypeError:
        out = None
    if out is None or not jnp.issubdtype(out, jnp.floating) or jnp.finfo(out).bits < 16:
        raise TypeError(
            "accumulator_dtype: expected float32, or another float of 16 bits or more; found "
            f"{brief(dtype)}."
        )
    return jax.dtypes.canonicalize_dtype(out)


def stored_dtype(dtype: jnp.dtype, decays: Sequence[Any], are_squares: bool) -> jnp.dtype:
    """The dtype in which averages are kept: the accumulator dtype where it can hold them.

    An average of decay d moves by (1 - d) of its distance to what comes in. Rounded to the nearest
    of a dtype whose neighbours are further apart than that, it does not move at all. Squares of
    gradients need float32's exponents: in float16 those of gradients below 1e-4 are zero.

    Args:
      dtype: the accumulator dtype.
      decays: of the averages that share an array.
      are_squares: whether they are averages of squared gradients.

    Returns:
      The dtype, or float32 where it cannot hold such averages.
    """
    limits = jnp.finfo(dtype)
    if limits.bits >= 32 or not decays:
        return dtype
    has_exponents = limits.nexp >= jnp.finfo(jnp.float32).nexp or not are_squares
    is_known = not any(isinstance(decay, jax.core.Tracer) for decay in decays)
    if has_exponents and is_known and all(1 - float(d) >= float(limits.eps) for d in decays):
        return dtype
    say_once(
        f"accumulator_dtype: {dtype.name} cannot hold averages of "
        + ("squared gradients " if are_squares else "gradients ")
        + f"of decay {', '.join(map(str, decays))}; these stay float32."
    )
    return jnp.dtype(jnp.float32)


def check_backend(backend: Any) -> None:
    """Raises ValueError unless it is one of the backends."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; found {brief(backend)}.")


def check_num_steps(num_steps: Any) -> None:
    """Raises TypeError or ValueError unless it is a positive integer or an array of one.

    An array may be of floats: `optax.inject_hyperparams` makes these of all numbers.
    """
    expected = "an integer, the updates of the whole training"
    if isinstance(num_steps, jax.Array | np.ndarray):
        check_array("num_steps", num_steps)
        if num_steps.ndim:
            raise ValueError(f"num_steps: expected {expected}; found shape {num_steps.shape}.")
        if not has_value(num_steps):
            return
        num_steps = num_steps.item()
        num_steps = int(num_steps) if num_steps == num_steps // 1 else num_steps
    check_count("num_steps", num_steps, expected)


def check_count(name: str, value: Any, expected: str) -> None:
    """Raises TypeError or ValueError, naming the argument, unless it is a positive int32."""
    is_array = isinstance(value, jax.Array)
    if is_array or isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{name}: expected {expected}; found {brief(value)} of type {type(value).__name__}."
            + (IN_STATIC_ARGS if is_array else "")
        )
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, found {brief(value)}.")
    if value > LARGEST_INDEX:
        raise ValueError(
            f"{name}: expected at most {LARGEST_INDEX:,}, as updates are counted in 32 bits; "
            f"found {brief(value)}."
        )


def learning_rate_at(learning_rate: ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """The learning rate at a step: () float32."""
    value = learning_rate(count) if callable(learning_rate) else learning_rate
    return scalar("learning_rate", value)


def scalar(name: str, value: Any, expected: str = "a number") -> jax.Array:
    """A number as () float32, or a TypeError or ValueError naming the argument."""
    try:
        given = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected {expected}; found {brief(value)}.") from error
    if jnp.issubdtype(given.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: expected {expected}; found {given.dtype.name}.")
    if given.size != 1:
        raise ValueError(f"{name}: expected {expected}; found shape {given.shape}.")
    return given.astype(jnp.float32).reshape(())


def weight_decay_of_tensors(
    weight_decay: Any, mask: Any, params: Any, stacked_axes: Any
) -> jax.Array:
    """Weight decay of every tensor of a tree.

    Args:
      weight_decay: ().
      mask: None, or as `optax.adamw`'s: a tree of bools that is a prefix of params, or a function
        from params to one.
      params: the parameters.
      stacked_axes: as in `lopt_jax.tensors.tensors_of`.

    Returns:
      () or (tensors,) float32.
    """
    weight_decay = scalar("weight_decay", weight_decay)
    if mask is None:
        return weight_decay
    tree = tree_of_mask(mask, params)
    return weight_decay * values_of_tensors("weight_decay_mask", tree, params, stacked_axes)


def tree_of_mask(mask: Any, params: Any) -> Any:
    """The bools, or traced ones, that a `weight_decay_mask` gives for the params: a prefix of them.

    Raises:
      TypeError: it is no such tree, or has other leaves than bools.
    """
    is_single = not callable(mask) and jax.tree_util.all_leaves([mask])
    if is_single and not jax.tree_util.all_leaves([params]):
        # what inject_hyperparams makes of a function of the params: it calls it with the step
        raise TypeError(
            "weight_decay_mask: expected a tree of bools like the params, or a function of them; "
            f"found {brief(mask)}. weight_decay=0 turns decay off." + IN_STATIC_ARGS
        )
    return jax.tree.map(_truth, mask(params) if callable(mask) else mask)


def _truth(x: Any) -> Any:
    """Whether a leaf decays, as a bool or a traced one."""
    dtype = getattr(x, "dtype", np.dtype(type(x)) if isinstance(x, bool | int) else None)
    is_known = dtype is not None and any(
        jnp.issubdtype(dtype, kind) for kind in (np.bool_, np.integer)
    )
    if not is_known or np.size(x) != 1:
        raise TypeError(
            "weight_decay_mask: expected True or False for each leaf of the params, or for each of "
            f"their subtrees; found {brief(x)}."
        )
    return x.reshape(()) != 0 if isinstance(x, jax.Array) else bool(x)


def values_of_tensors(name: str, tree: Any, params: Any, stacked_axes: Any) -> jax.Array:
    """Numbers given for leaves, for every tensor.

    Args:
      name: the argument that holds them, for the message.
      tree: tree of numbers that is a prefix of params.
      params: the parameters.
      stacked_axes: as in `lopt_jax.tensors.tensors_of`.

    Returns:
      (tensors,) float32.

    Raises:
      ValueError: the tree is no prefix of params.
    """
    chosen = prefix_of_params(name, tree, params)
    values = [
        jnp.full((entry.count,), x, jnp.float32)
        for x, entry in zip(chosen, tensors_of(params, stacked_axes), strict=True)
    ]
    return jnp.concatenate(values) if values else jnp.zeros((0,), jnp.float32)


@dataclass(frozen=True)
class Options:
    """The keyword arguments that all optimizers share, checked.

    Raises:
      TypeError, ValueError: an argument is wrong; the message names it.
    """

    learning_rate: ScalarOrSchedule = 1.0
    weight_decay: Any = 0.0
    weight_decay_mask: Any = None
    accumulator_dtype: Any = "float32"
    stacked_axes: Any = None
    backend: str = "auto"
    precision: Any = "highest"

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        check_number("weight_decay", self.weight_decay, is_finite=True)
        check_backend(self.backend)
        object.__setattr__(self, "accumulator_dtype", check_dtype(self.accumulator_dtype))
        object.__setattr__(self, "precision", check_precision(self.precision))

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> "Options":
        """The options among the arguments of a constructor.

        Args:
          arguments: by name, as `locals()` has them at the start of a constructor.
          **others: options that have other values than the arguments of their names.

        Returns:
          The options.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{**{k: x for k, x in arguments.items() if k in names}, **others})

    def accumulator_dtypes(self, config: Mapping[str, Any]) -> Accumulators:
        """The dtype of each accumulator, by the decays in the config of the weights.

        Where decays are learned, their initial values count.
        """
        momenta = config.get("initial_momentum_decays", ())
        factored = config.get("initial_adafactor_decays", ())
        rms = config.get("initial_rms_decays", ())
        squares = functools.partial(stored_dtype, self.accumulator_dtype, are_squares=True)
        return Accumulators(
            momentum=tuple(stored_dtype(self.accumulator_dtype, (d,), False) for d in momenta),
            second_moment=squares(rms)
            if len(rms) == 1
            else SecondMoments(tuple(squares((d,)) for d in rms)),
            row=squares(factored),
            column=squares(factored),
        )

    def rates(self, count: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        """Learning rate and weight decay times learning rate at a step.

        Args:
          count: () int32, updates made so far.
          params: the parameters.

        Returns:
          () and, () or (tensors,), float32.
        """
        rate = learning_rate_at(self.learning_rate, count)
        decay = weight_decay_of_tensors(
            self.weight_decay, self.weight_decay_mask, params, self.stacked_axes
        )
        return rate, rate * decay


def surrounded[Result](function: Callable[..., Result]) -> Callable[..., Result]:
    """A function of trees whose code is traced the same however its caller has set jax."""

    @functools.wraps(function)
    def wrapped(*trees: Any, **options: Any) -> Result:
        with usual_promotion(), mesh_of(trees):
            return function(*trees, **options)

    return wrapped


def clip_by_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`, but in float32 whatever the gradients' dtype.

    Args:
      max_norm: the largest global norm.

    Returns:
      A stateless transformation; its updates are float32 at least.
    """

    @surrounded
    def lopt_clip(tracing: Tracing, gradients: Any) -> Any:
        wide = jax.tree.map(lambda g: to_float32(g) if has_values(g) else None, gradients)
        return clipped(wide, squared_global_norm(tracing, wide), max_norm)

    compiled = compiled_by_shards(lopt_clip)

    def update(
        gradients: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        lopt_tracing: Tracing | None = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.EmptyState]:
        del params, extra_args
        return compiled(lopt_tracing or Tracing(), gradients), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def squared_global_norm(tracing: Tracing, tree: Any) -> jax.Array:
    """The sum of the squares of all elements of a tree, whole or in shards: ()."""
    return jnp.asarray(sum(sums_of_leaves(jnp.square, tracing, tree)))


def clipped(gradients: Any, squared_norm: jax.Array, max_norm: float | jax.Array) -> Any:
    """Gradients scaled down to a global norm.

    Args:
      gradients: tree of arrays, float32 at least.
      squared_norm: of `squared_global_norm`.
      max_norm: the largest global norm.

    Returns:
      The tree.
    """
    norm = jnp.sqrt(squared_norm)
    return jax.tree.map(lambda g: g * jnp.where(norm <= max_norm, 1, max_norm / norm), gradients)


def sums_of_leaves(
    function: Callable[[jax.Array], jax.Array], tracing: Tracing, tree: Any
) -> list[jax.Array]:
    """Sums of an elementwise function over the leaves of a tree, whole or in shards.

    Args:
      function: from an array to one of its shape.
      tracing: what steers the trace: of what the leaves are shards.
      tree: pytree of arrays; paths are the parameters'.

    Returns:
      A scalar a leaf, the same on every device that holds a shard.
    """
    partitions = partitions_of_leaves(tree, tracing.shards)
    sums = []
    for x, partition in zip(jax.tree.leaves(tree), partitions, strict=True):
        total = jnp.sum(function(x))
        names = () if partition is None else partition.names(range(x.ndim))
        sums.append(jax.lax.psum(total, names) if names else total)
    return sums


def _count_not_finite(x: jax.Array) -> jax.Array:
    return jnp.asarray(~jnp.isfinite(x), jnp.float32)


def compiled_by_shards(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function of `Tracing` and trees, whose name says whether it knows of shards.

    `lopt_jax.sharding.distributed` goes by the name: a wrapper may have lost what was told.

    Args:
      function: `lopt_...`; with `_of_shards` added it is one of `elementwise.OWN_FUNCTIONS`.

    Returns:
      The function.
    """

    def of_shards(tracing: Tracing, *trees: Any) -> Any:
        return function(tracing, *trees)

    of_shards.__name__ = f"{function.__name__}_of_shards"
    whole = jax.jit(function, static_argnums=0)
    parts = jax.jit(of_shards, static_argnums=0)

    def run(tracing: Tracing, *trees: Any) -> Any:
        return (whole if tracing.shards is None else parts)(tracing, *trees)

    return run


def lopt_all_finite(tracing: Tracing, tree: Any) -> jax.Array:
    """As `all_finite`, to be compiled."""
    counts = sums_of_leaves(_count_not_finite, tracing, tree)
    return functools.reduce(jnp.logical_and, [count == 0 for count in counts], jnp.array(True))


def all_finite(tracing: Tracing, tree: Any) -> jax.Array:
    """Whether all elements of a tree are finite, on all devices that hold shards of it: () bool."""
    return surrounded(compiled_by_shards(lopt_all_finite))(tracing, tree)


def to_float32(x: jax.Array) -> jax.Array:
    """The array in float32, or in its own dtype where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def require_params(params: Any) -> None:
    """Raises optax's own error where params are missing."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)


def require_value(name: str, value: Any) -> jax.Array:
    """The loss as () float32, or an error that names `value=`."""
    if value is None:
        raise ValueError(
            f"{name} reads the loss at every step: call update(grads, state, params, value=loss), "
            "of flax.nnx.Optimizer update(model, grads, value=loss). Some wrappers keep value= "
            "from the optimizer inside them: flax.training.train_state.TrainState "
            "(lopt_jax.flax.TrainState hands it on), "
            "optax.MultiSteps(...).gradient_transformation() (MultiSteps itself hands it on), "
            "optax.lookahead and optax.contrib.split_real_and_imaginary."
        )
    if isinstance(value, tuple | list | dict):
        raise TypeError(
            f"value: expected the loss, a scalar; found a {type(value).__name__}. Of "
            "jax.value_and_grad(..., has_aux=True) it is the first of what comes with the gradient."
        )
    return scalar("value", value, "the loss, a scalar")


def check_alike_on_devices(value: jax.Array, tree: Any) -> None:
    """Raises ValueError where the loss differs between devices on which a tree does not.

    Its replicas would drift apart without a word. It is known inside a `shard_map` that checks
    types, not under `pmap`.
    """
    known = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
    names = varying_axes(value).difference(*map(varying_axes, known))
    if names:
        name = sorted(names)[0]
        raise ValueError(
            f"value: the loss differs between the devices of the axis {name!r}, gradients and "
            f"params do not; give the loss's mean, jax.lax.pmean(loss, {name!r}), or use "
            "lopt_jax.sharding.distributed, which takes it."
        )


def check_state_type(state: Any, state_type: type) -> None:
    """Raises TypeError, saying what the state is, unless it is of the type that init returns."""
    if isinstance(state, state_type):
        return
    raise TypeError(
        f"state: expected a {state_type.__name__}, which init of this optimizer returns; found "
        f"{_kind_of_state(state)}"
    )


def _kind_of_state(state: Any) -> str:
    """What was given as a state, in words: the end of a sentence."""
    found = type(state)
    if found.__module__.startswith("lopt_jax"):
        about = (found.__doc__ or "").partition("\n")[0]
        return f"{found.__name__}: {about}" if about else f"{found.__name__}."
    if found is tuple:
        return (
            "a tuple, as the states of optax.chain and of its optimizers, such as optax.adamw, are."
        )
    if isinstance(state, dict | list):
        return (
            f"a {found.__name__}, as checkpoints are restored without a target: give Orbax "
            "jax.eval_shape(tx.init, params)."
        )
    if found.__module__.startswith("optax"):
        return f"{found.__name__}, the state of a transformation of optax."
    return f"{found.__name__}."


def check_state_shapes(state: Any, expected: Any, ranks_alone: bool = False) -> None:
    """Raises ValueError, naming the first array that differs, unless the shapes are the expected.

    Args:
      state: the state.
      expected: tree of what has a shape, in the order of the state's arrays. Metadata boxes may
        differ, and so may dtypes: a state keeps its own.
      ranks_alone: of shards the sizes are those that `lopt_jax.sharding.distributed` gave them.
    """
    leaves = jax.tree.leaves(state)
    wanted = jax.tree_util.tree_leaves_with_path(expected)
    belongs = (
        "A state belongs to the optimizer, the weights and the settings (stacked_axes, label_fn) "
        "that made it."
    )
    if len(leaves) != len(wanted):
        raise ValueError(
            f"state: expected {len(wanted)} arrays, as init makes for these params, found "
            f"{len(leaves)}. {belongs}"
        )
    for leaf, (path, like) in zip(leaves, wanted, strict=True):
        if jnp.shape(leaf) != like.shape and not (ranks_alone and jnp.ndim(leaf) == like.ndim):
            raise ValueError(
                f"state: expected the shape {like.shape} at {jax.tree_util.keystr(path)}, as init "
                f"makes for these params, found {jnp.shape(leaf)}. {belongs}"
            )


def transformation(
    options: Options,
    init: Callable[[Any], Any],
    update: Callable[..., tuple[Any, Any]],
    meta_parameters: Any,
    state_type: type,
    apply: Callable[..., tuple[Any, Any]] | None = None,
    without_kernels: str = "",
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from pure functions.

    The update is compiled also where the caller does not: run one operation at a time, a learned
    rule would be hundreds of times slower.

    Args:
      options: the arguments that all optimizers share.
      init: from params to the state.
      update: (tracing, meta_parameters, updates, state, params, value) -> (updates, state).
      meta_parameters: pytree of arrays that the update reads.
      state_type: what init returns.
      apply: as update, but it returns the new params in place of the updates; None where there is
        no such form.
      without_kernels: why the fused kernels do not know the rule, part of a sentence for
        `lopt_jax.describe`; "": they know it.

    Returns:
      The transformation; it ignores extra arguments other than `value`.

    Raises:
      TypeError, ValueError: params are no arrays of real numbers, updates are not like them, the
        state is no such state; the message names the leaf.
    """
    # Partials, and not closures: libraries that open the closures of init and update to find arrays
    # in them (optimistix does) take what they find for static arguments, which have to be hashable.
    initial = functools.partial(_init, surrounded(init), options.stacked_axes)

    def step_of(function: Callable[..., tuple[Any, Any]], applies: bool) -> Callable[..., Any]:
        compiled = _compiled(function, init, applies)
        return functools.partial(_step, compiled, meta_parameters, state_type)

    step = step_of(update, applies=False)

    def init_fn(params: Any) -> Any:
        """The state of an optimizer for parameters, a pytree of arrays."""
        return initial(params)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        """Updates like the params, to be added to them, and the new state.

        Args:
          updates: gradients, a tree like params; where a leaf has none there is None, or the float0
            that jax gives for integers.
          state: of init.
          params: the parameters.
          value: the loss, a scalar, where the optimizer reads it.
          **extra_args: not read.

        Returns:
          The updates, None where there is no gradient, and the state.
        """
        del extra_args
        return step(updates, state, params, value)

    if apply is None:
        return LearnedTransformation.of(init_fn, update_fn, None, without_kernels=without_kernels)
    applied = step_of(apply, applies=True)

    def apply_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        return applied(updates, state, params, value)

    return LearnedTransformation.of(init_fn, update_fn, apply_fn, without_kernels=without_kernels)


def _init(init: Callable[[Any], Any], stacked_axes: StackedAxes, params: Any) -> Any:
    params = check_params(params)
    say_stacks(params, stacked_axes)
    return init(params)


def _compiled(
    function: Callable[..., tuple[Any, Any]], init: Callable[[Any], Any], applies: bool
) -> Callable[..., Any]:
    """The jitted step of an optimizer, which sees gradients, or None, and numbers alone.

    It refuses states that are not as `init` makes them for the params.
    """

    @surrounded
    def lopt_update(
        tracing: Tracing,
        meta_parameters: Any,
        updates: Any,
        state: Any,
        params: Any,
        value: Any,
    ) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(params)
        gradients = gradients_like(updates, params)
        expected = jax.eval_shape(init, params)
        check_state_shapes(state, expected, ranks_alone=tracing.shards is not None)
        leaves_like("state: accumulators", state.accumulators, expected.accumulators)
        made, new_state = function(
            tracing,
            meta_parameters,
            treedef.unflatten(gradients),
            state,
            treedef.unflatten(numbers_of(params)),
            value,
        )
        results = [
            result if gradient is not None else leaf if applies else None
            for result, gradient, leaf in zip(
                treedef.flatten_up_to(made), gradients, leaves, strict=True
            )
        ]
        # a state keeps its dtypes also where parameters are of a wider one
        new_state = jax.tree.map(lambda x, old: x.astype(old.dtype), new_state, state)
        return treedef.unflatten(results), new_state

    return compiled_by_shards(lopt_update)


def _step(
    compiled: Callable[..., tuple[Any, Any]],
    meta_parameters: Any,
    state_type: type,
    updates: Any,
    state: Any,
    params: Any,
    value: Any,
) -> tuple[Any, Any]:
    require_params(params)
    own = state.state if isinstance(state, Steered) else state
    check_state_type(own, state_type)
    check_numpy(updates=updates, state=own, params=params, value=value)
    tracing = state.tracing if isinstance(state, Steered) else Tracing()
    tracing = replace(
        tracing,
        device=platform_of(updates)
        or tracing.device
        or jax.config.jax_default_device
        or platform_of_mesh(updates),
        # in a program of the caller's, arrays that have values are its constants
        constant_weights=is_traced(updates) and not is_traced(meta_parameters),
    )
    result, new_state = compiled(tracing, meta_parameters, updates, own, params, value)
    return result, replace(state, state=new_state) if isinstance(state, Steered) else new_state


def described[**P](
    constructor: Callable[P, optax.GradientTransformationExtraArgs],
) -> Callable[P, optax.GradientTransformationExtraArgs]:
    """Has the optimizers of a constructor say in their repr which weights and settings they have.

    Args:
      constructor: takes `weights`.

    Returns:
      The constructor. It raises NotImplementedError for `backend="pallas"` where the fused kernels
      do not know the rule.
    """
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def construct(*args: P.args, **kwargs: P.kwargs) -> optax.GradientTransformationExtraArgs:
        tx = constructor(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        names = {*given.arguments, "weights"}
        given.apply_defaults()
        without_kernels = getattr(tx, "without_kernels", "")
        if without_kernels and given.arguments.get("backend") == "pallas":
            raise NotImplementedError(
                f"backend='pallas': {constructor.__name__} with these weights has no fused "
                f"kernels: {without_kernels}. backend='auto' uses XLA."
            )
        arguments = {name: x for name, x in given.arguments.items() if name in names}
        return LearnedTransformation.of(
            tx.init,
            tx.update,
            apply_of(tx),
            (constructor.__name__, arguments),
            getattr(tx, "plans", None),
            without_kernels,
        )

    return construct


def check_precision(precision: str) -> jax.lax.Precision:
    """The precision of matrix products, or a ValueError naming the argument."""
    try:
        return jax.lax.Precision(precision)
    except (TypeError, ValueError):
        raise ValueError(
            f"precision: expected 'highest', 'high' or 'default', found {brief(precision)}."
        ) from None
