"""lopt: a direction for matrices inside a recipe that leaves nothing to tune but the steps."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lopt_jax.brief import brief
from lopt_jax.optimizers import common
from lopt_jax.optimizers.adam import AdamSettings
from lopt_jax.optimizers.matrices import (
    ARCHITECTURES,
    LINEAR,
    AdamW,
    matrix_optimizer,
    rule_precision,
)
from lopt_jax.optimizers.plans import (
    ADAMW,
    LEARNED,
    LabelFn,
    LeafPlan,
    Matrix,
    MatrixAxes,
    Plans,
    check_functions,
    matrix_of,
)
from lopt_jax.optimizers.roles import (
    EMBEDDING,
    HEAD,
    MATRIX,
    ROLES,
    Role,
    likely_matrix,
    matrix_sizes,
    roles_of,
)
from lopt_jax.rules.newton_schulz import check_precision
from lopt_jax.tensors import StackedAxes
from lopt_jax.weights import WeightsLike, resolve

Number = float | jax.Array


@dataclass(frozen=True)
class Recipe:
    """The constants of `lopt`, chosen on the tuning tasks of the scale suite.

    Attributes:
      matrix: the root mean square of a matrix step is this over the root of the shorter side, ...
      narrowing: ... times (outputs / inputs) to this power where it has fewer outputs than inputs.
      bottleneck: a matrix with more than this many times more inputs than outputs makes smaller
        steps yet (of a convolution, inputs are channels), ...
      bottleneck_narrowing: ... by (bottleneck * outputs / inputs) to this power.
      embedding: Adam's rate for embeddings.
      head: Adam's rate for heads is this over the number of inputs, ...
      head_limit: ... but at most this.
      vector: Adam's rate for norms, biases and other vectors.
      decay: a full step takes the fraction decay / num_steps off matrices, embeddings and heads.
      shortest: num_steps counts as at least so many where decay is divided by it.
      horizon: trainings of fewer steps make larger ones, ...
      growth: ... by (horizon / num_steps) to this power, where they are Adam's.
      shrinking: trainings of more than `horizon` steps make smaller ones, by (horizon / num_steps)
        to this power, ...
      decay_growth: ... and decay more, by (num_steps / horizon) to this power.
      fading: steps get smaller where the gradient's norm falls below this times
        1 - horizon / num_steps of what it was in the training so far: never in shorter ones.
      warm_up: the fraction of the training over which steps grow.
      floor: the smallest size of a step after the warm-up: what training past num_steps goes on
        with, as a fraction of a full step.
      max_gradient_norm: gradients are scaled down to this global norm.
      adam_momentum: decay of Adam's first moment.
      adam_window: Adam's second moment averages over this fraction of the training, ...
      adam_windows: ... but over at least and at most so many steps.
    """

    matrix: Number = 0.038
    narrowing: Number = 0.25
    bottleneck: Number = 4.0
    bottleneck_narrowing: Number = 0.75
    embedding: Number = 0.02
    head: Number = 3.0
    head_limit: Number = 0.016
    vector: Number = 0.008
    decay: Number = 12.0
    shortest: Number = 600.0
    horizon: Number = 1000.0
    growth: Number = 1 / 3
    shrinking: Number = 0.25
    decay_growth: Number = 0.4
    fading: Number = 0.3
    warm_up: Number = 0.1
    floor: Number = 0.01
    max_gradient_norm: Number = 1.0
    adam_momentum: Number = 0.9
    adam_window: Number = 0.2
    adam_windows: tuple[Number, Number] = (200.0, 1000.0)


@common.described
def lopt(
    num_steps: int | jax.Array,
    weights: WeightsLike = "lopt",
    *,
    learning_rate: common.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array = 1.0,
    weight_decay_mask: Any = None,
    label_fn: LabelFn | None = None,
    matrix_axes: MatrixAxes = None,
    recipe: Recipe | None = None,
    accumulator_dtype: jax.typing.DTypeLike = "float32",
    stacked_axes: StackedAxes = None,
    backend: str = "auto",
    precision: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """This library's own optimizer: nothing to give but the number of steps.

    A rule proposes the direction of every matrix; that of the library's own weights is a sum of
    the gradient and its momentum. Newton-Schulz iterations make it nearly orthogonal. Embeddings,
    heads, norms and biases are Adam's. The recipe decides the size of every leaf's step by its role
    and shape, warm-up, schedule, clipping and decay. Embeddings and heads are found by the names of
    Flax's layers and by shapes; `lopt_jax.describe(tx, params)` shows what was found.

    A parameter whose gradient is zero does not move, decay aside. After `num_steps` the training
    goes on with a hundredth of a full step.

    Args:
      num_steps: updates of the whole training; an integer, or a traced array.
      weights: a registered name, a path to a checkpoint, or `Weights` of the linear rule or of the
        Celo2 family.
      learning_rate: multiplies every step; a number or an optax schedule of multipliers.
      weight_decay: multiplies the recipe's decay; 0 turns it off.
      weight_decay_mask: which parameters may decay, as `optax.adamw`'s `mask`; norms and biases do
        not decay in any case.
      label_fn: from the path and the leaf to "learned", "adamw", or the name of a role of
        `lopt_jax.optimizers.roles.ROLES`; None: as found. It may return None for a leaf: as found.
      matrix_axes: where the matrices of leaves of rank three and more are, as `celo2`'s.
      recipe: other constants; None: the library's.
      accumulator_dtype: dtype of momentum and second moments in the state.
      stacked_axes: how many leading axes of a leaf hold separate tensors (layers of a scanned
        model): an int, a tree of ints, or a function of path and leaf.
      backend: "auto" or "xla"; "pallas" for weights of the Celo2 family alone: the linear rule has
        no kernels, and XLA fuses it.
      precision: of the products of Newton-Schulz, as `celo2`'s.

    Returns:
      An optax transformation. It does not read the loss.

    Raises:
      WeightsError: the weights are missing, damaged, or of another architecture.
      TypeError, ValueError: an argument is wrong; the message names it.

    Reference:
      The direction: Moudgil et al., arXiv 2602.19142. Decay only where a step shrinks a parameter:
      Chen et al., arXiv 2510.12402.
    """
    common.check_num_steps(num_steps)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a lopt_jax.Recipe, found {type(recipe).__name__}.")
    check_precision(precision)
    constants = Recipe() if recipe is None else recipe
    _check_recipe(constants)
    options = common.Options(
        learning_rate=_scheduled(learning_rate, num_steps, constants),
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        accumulator_dtype=accumulator_dtype,
        stacked_axes=stacked_axes,
        backend=backend,
        precision=rule_precision(precision),
    )
    common.check_learning_rate(learning_rate)
    whole = constants.decay * _lengthened(num_steps, constants) ** constants.decay_growth
    per_step = weight_decay * whole / jnp.maximum(num_steps, constants.shortest)
    return matrix_optimizer(
        resolve(weights, (LINEAR, *ARCHITECTURES), has_own=False),
        options,
        AdamW(1.0, 0.0, AdamSettings(adam_betas(num_steps, constants), 1e-8)),
        plans=lopt_plans(num_steps, constants, label_fn, matrix_axes),
        max_gradient_norm=constants.max_gradient_norm,
        orthogonal=True,
        decay=lambda count: per_step * schedule(count, num_steps, constants),
        precision=precision,
        still_where_zero=True,
        cautious_decay=True,
        fading=constants.fading * (1 - 1 / _lengthened(num_steps, constants)),
    )


_DIVISORS = ("horizon", "adam_windows")  # of the recipe


def _check_recipe(recipe: Recipe) -> None:
    """Raises TypeError or ValueError, naming the constant, unless all are numbers of their kind."""
    for field in fields(recipe):
        value, name = getattr(recipe, field.name), f"recipe: {field.name}"
        numbers = [value]
        if field.name == "adam_windows":
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(f"{name}: expected two numbers, found {brief(value)}.")
            numbers = list(value)
        elif field.name == "max_gradient_norm" and value is None:
            continue
        for number in numbers:
            common.check_number(name, number, is_finite=field.name != "max_gradient_norm")
            if field.name in _DIVISORS and common.has_value(number) and number <= 0:
                raise ValueError(f"{name}: expected a number above 0, found {brief(number)}.")


def schedule(count: jax.Array, num_steps: int | jax.Array, recipe: Recipe) -> jax.Array:
    """The size of a step: a linear warm-up, then linearly down to the floor.

    Args:
      count: () int32, updates made before this one.
      num_steps: updates of the whole training.
      recipe: the constants.

    Returns:
      () float32 in (0, 1].
    """
    steps = jnp.asarray(num_steps, jnp.float32)
    count = jnp.asarray(count, jnp.float32)  # of integers the last has no next
    warm = jnp.maximum(recipe.warm_up * steps, 1.0)
    up = (count + 1) / warm
    down = (steps - count) / jnp.maximum(steps - warm, 1.0)
    return jnp.minimum(jnp.minimum(up, 1.0), jnp.maximum(down, recipe.floor))


def adam_betas(num_steps: int | jax.Array, recipe: Recipe) -> tuple[Number, Number]:
    """Decays of Adam's moments.

    Where a long training has learned its examples, gradients vanish. A second moment that forgets
    quickly would make steps of full size of them.

    Args:
      num_steps: updates of the whole training.
      recipe: the constants.

    Returns:
      Two numbers in [0, 1).
    """
    shortest, longest = recipe.adam_windows
    window = _smaller(_larger(recipe.adam_window * num_steps, shortest), longest)
    return recipe.adam_momentum, 1 - 1 / window


def _scheduled(
    learning_rate: common.ScalarOrSchedule, num_steps: int | jax.Array, recipe: Recipe
) -> Any:
    def rate(count: jax.Array) -> jax.Array:
        multiplier = common.learning_rate_at(learning_rate, count)
        return multiplier * schedule(count, num_steps, recipe)

    return rate


def lopt_plans(
    num_steps: int | jax.Array, recipe: Recipe, label_fn: LabelFn | None, matrix_axes: MatrixAxes
) -> Plans:
    """The plans of `lopt`: what is done with each leaf follows from its role.

    Args:
      num_steps: updates of the whole training.
      recipe: the constants.
      label_fn: as `lopt`'s.
      matrix_axes: as `lopt`'s.

    Returns:
      The function; it raises ValueError or TypeError naming argument and leaf.
    """
    check_functions(label_fn, matrix_axes)

    def plans(params: Any, stacked: Sequence[int]) -> list[LeafPlan]:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        roles = roles_of(params, stacked)
        plans_of_leaves = []
        for (path, leaf), count, role in zip(leaves, stacked, roles, strict=True):
            label = None if label_fn is None else label_fn(path, leaf)
            if label is not None:
                role = _labelled(label, path, leaf, count)
            if matrix_axes is not None and role.name in (MATRIX, HEAD):
                matrix, reason = matrix_of(matrix_axes, path, leaf, count)
                role = role._replace(matrix=matrix, reason=reason)
            plans_of_leaves.append(_plan(role, leaf.shape[count:], recipe, num_steps))
        return plans_of_leaves

    return plans


def _smaller(a: Number, b: Number) -> Number:
    """The smaller of two numbers, one of which may be traced."""
    return jnp.minimum(a, b) if isinstance(a * b, jax.Array) else min(a, b)


def _larger(a: Number, b: Number) -> Number:
    """The larger of two numbers, one of which may be traced."""
    return jnp.maximum(a, b) if isinstance(a * b, jax.Array) else max(a, b)


def _lengthened(num_steps: int | jax.Array, recipe: Recipe) -> Number:
    """How many times longer than the recipe's horizon a training is; 1 for shorter ones."""
    return _larger(num_steps / recipe.horizon, 1.0)


def _labelled(label: Any, path: Any, leaf: Any, stacked: int) -> Role:
    """The role that `label_fn` gives a leaf, or a ValueError naming the leaf."""
    rank = leaf.ndim - stacked
    names = {LEARNED: MATRIX, ADAMW: EMBEDDING, **{role: role for role in ROLES}}
    name = names.get(label) if isinstance(label, str) else None
    if name is None or (name in (MATRIX, HEAD) and rank < 2):
        raise ValueError(
            f"label_fn: expected one of {', '.join(names)}, or None, for the leaf "
            f"{jax.tree_util.keystr(path)} of rank {rank} (learned, matrix and head are for "
            f"rank two and more); found {brief(label)}."
        )
    matrix = likely_matrix(path, leaf.shape[stacked:])[0] if rank >= 2 else Matrix()
    return Role(name, "label_fn says so", matrix)


def _plan(role: Role, shape: Sequence[int], recipe: Recipe, num_steps: int | jax.Array) -> LeafPlan:
    """What is done with a leaf of a role.

    Args:
      role: of the leaf.
      shape: of one tensor.
      recipe: the constants.
      num_steps: updates of the whole training.
    """
    reason = f"{role.name}: {role.reason}"
    long = _lengthened(num_steps, recipe)
    if role.name == MATRIX:
        inputs, outputs = matrix_sizes(role.matrix, shape)
        shorter = max(min(inputs, outputs), 1)  # an empty leaf has none
        narrow = min(outputs / max(inputs, 1), 1.0) ** recipe.narrowing
        channels = shape[role.matrix.rows[-1] % len(shape)]  # of a kernel without window: inputs
        bottleneck = _smaller(recipe.bottleneck * outputs / max(channels, 1), 1.0)
        narrow *= bottleneck**recipe.bottleneck_narrowing
        if not isinstance(bottleneck, jax.Array) and bottleneck < 1:
            reason += "; a bottleneck"
        scale = recipe.matrix / shorter**0.5 * narrow / long**recipe.shrinking
        return LeafPlan(LEARNED, role.matrix, scale, reason=reason)
    growth = _larger(recipe.horizon / num_steps, 1.0) ** recipe.growth / long**recipe.shrinking
    if role.name == HEAD:
        inputs, _ = matrix_sizes(role.matrix, shape)
        rate = _smaller(recipe.head / max(inputs, 1), recipe.head_limit)
        return LeafPlan(ADAMW, role.matrix, rate * growth, reason=reason)
    if role.name == EMBEDDING:
        return LeafPlan(ADAMW, scale=recipe.embedding * growth, reason=reason)
    return LeafPlan(ADAMW, scale=recipe.vector * growth, decay=0.0, reason=reason)
