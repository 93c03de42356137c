"""What optax promises of a transformation, for every optimizer."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import orbax.checkpoint as ocp
import pytest
from optax._src.base import NO_PARAMS_MSG
from optimizers import OPTIMIZERS

import lopt_jax
import pallas_kernels
from lopt_jax.tensors import tensors_of
from lopt_jax.weights.schema import expected_shapes

LOSS = 1.5
PARAMS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "b": np.ones(4, np.float32)}

DECAYS_AS_ADAMW = [n for n, case in OPTIMIZERS.items() if not case.decays_after | case.has_recipe]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
KINDS = optimizers.REPRESENTATIVES
every_kind = pytest.mark.parametrize("name", optimizers.in_kind())
# What optax and JAX wrap around an update: one network and banks of them are wrapped alike.
WRAPPED = [name for name in OPTIMIZERS if name != "small_fc_lopt"]
every_wrapped_kind = pytest.mark.parametrize(
    "name",
    [*optimizers.in_kind(*WRAPPED), pytest.param("small_fc_lopt", marks=pytest.mark.nightly)],
)


@pytest.fixture
def params():
    return jax.tree.map(jnp.asarray, PARAMS)


def gradients_of(params, step=0):
    return optimizers.random_like(params, seed=100 + step, scale=0.1)


def run(update, params, state, steps, start=0, like=None):
    """Parameters and state after some steps; the gradients depend on step and shapes alone.

    These are the shapes of `like`, where it is given, and of the params elsewhere.
    """
    like = params if like is None else like
    for step in range(start, start + steps):
        updates, state = update(gradients_of(like, step), state, params, value=LOSS / (step + 1))
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(actual, expected, tolerance=1e-5):
    """Every leaf within a fraction of its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, jax.tree_util.keystr(path)
        bound = tolerance * np.max(np.abs(e), initial=0.0)
        worst = np.max(np.abs(a - e), initial=0.0)
        assert worst <= bound, f"{jax.tree_util.keystr(path)}: {worst} > {bound}"


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def boxes_of(tree):
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return [x for x in jax.tree.leaves(tree, is_leaf=is_box) if is_box(x)]


@every_optimizer
def test_moves_every_parameter(name, params):
    tx = optimizers.plain(name)
    updates, _ = tx.update(gradients_of(params), tx.init(params), params, value=LOSS)
    for leaf, update in updates.items():
        assert update.shape == params[leaf].shape
        assert np.isfinite(update).all()
        assert np.abs(update).max() > 0


@every_optimizer
def test_unknown_extra_arguments_are_ignored(name, params):
    tx = optimizers.plain(name)
    state = tx.init(params)
    gradients = gradients_of(params)
    expected, _ = tx.update(gradients, state, params, value=LOSS)
    actual, _ = tx.update(gradients, state, params, value=LOSS, value_fn=len, grad=3, other="x")
    assert_equal(actual, expected)


@every_wrapped_kind
def test_second_call_does_not_recompile(name, params):
    tx = optimizers.plain(name)
    traces = []

    @jax.jit
    def step(params, state, loss):
        traces.append(1)
        updates, state = tx.update(gradients_of(PARAMS), state, params, value=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for loss in (1.0, 2.0, 3.0):
        params, state = step(params, state, loss)
    assert len(traces) == 1
    assert step._cache_size() == 1


@every_optimizer
def test_second_call_without_jit_compiles_nothing(name, params, caplog):
    tx = optimizers.plain(name)
    params, state = run(tx.update, params, tx.init(params), 2)
    gradients = gradients_of(params)
    tx.update(gradients, state, params, value=LOSS)
    with jax.log_compiles(True):
        tx.update(gradients, state, params, value=LOSS)
    assert not [r for r in caplog.records if "ompil" in r.getMessage()]


@every_optimizer
def test_map_params(name, params):
    tx = optimizers.plain(name)
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert_equal(mapped.accumulators, jax.tree.map(lambda x: x + 1, state.accumulators))
    assert_equal(mapped._replace(accumulators=None), state._replace(accumulators=None))


@every_optimizer
def test_map_params_pairs_the_state_with_a_tree_like_params(name, params):
    tx = optimizers.plain(name)
    mapped = optax.tree.map_params(
        tx,
        lambda _, leaf: leaf,
        tx.init(params),
        {"w": "matrix", "b": "bias"},
        transform_non_params=lambda _: None,
    )
    for tree in optimizers.averages(mapped):
        assert tree == {"w": "matrix", "b": "bias"}


@every_optimizer
def test_missing_params_raise_the_error_of_optax(name, params):
    tx = optimizers.plain(name)
    state = tx.init(params)
    with pytest.raises(ValueError, match=NO_PARAMS_MSG[:40]):
        tx.update(gradients_of(params), state, value=LOSS)
    with pytest.raises(ValueError, match=NO_PARAMS_MSG[:40]):
        tx.update(gradients_of(params), state, None, value=LOSS)


@pytest.mark.parametrize("name", [n for n, case in OPTIMIZERS.items() if case.reads_loss])
def test_missing_loss_is_named(name, params):
    tx = optimizers.plain(name)
    with pytest.raises(ValueError, match="value="):
        tx.update(gradients_of(params), tx.init(params), params)


@pytest.mark.parametrize("name", [n for n, case in OPTIMIZERS.items() if not case.reads_loss])
def test_loss_is_optional_where_the_rule_does_not_read_it(name, params):
    tx = optimizers.plain(name)
    state = tx.init(params)
    with_loss, _ = tx.update(gradients_of(params), state, params, value=LOSS)
    without, _ = tx.update(gradients_of(params), state, params)
    assert_close(without, with_loss, 1e-6)


# -- wrappers -----------------------------------------------------------------------------------


@every_optimizer
def test_chain(name, params):
    tx = optimizers.plain(name)
    chained = optax.chain(optax.scale(0.5), tx, optax.scale(2.0))
    gradients = gradients_of(params)
    actual, _ = chained.update(gradients, chained.init(params), params, value=LOSS)
    halves = jax.tree.map(lambda g: 0.5 * g, gradients)
    expected, _ = tx.update(halves, tx.init(params), params, value=LOSS)
    assert_close(actual, jax.tree.map(lambda u: 2 * u, expected), 1e-6)


@every_wrapped_kind
def test_masked(name, params):
    tx = optimizers.plain(name)
    masked = optax.masked(tx, {"w": True, "b": False})
    gradients = gradients_of(params)
    actual, state = masked.update(gradients, masked.init(params), params, value=LOSS)
    assert_equal(actual["b"], gradients["b"])
    only = {"w": params["w"]}
    expected, _ = tx.update({"w": gradients["w"]}, tx.init(only), only, value=LOSS)
    assert_close(actual["w"], expected["w"])
    for tree in optimizers.averages(state.inner_state):
        assert isinstance(tree["b"], optax.MaskedNode)


@every_wrapped_kind
def test_multi_transform(name, params):
    tx = optimizers.plain(name)
    both = optax.multi_transform(
        {"learned": tx, "sgd": optax.sgd(0.1)}, {"w": "learned", "b": "sgd"}
    )
    gradients = gradients_of(params)
    actual, _ = both.update(gradients, both.init(params), params, value=LOSS)
    assert_close(actual["b"], -0.1 * gradients["b"], 1e-6)
    only = {"w": params["w"]}
    expected, _ = tx.update({"w": gradients["w"]}, tx.init(only), only, value=LOSS)
    assert_close(actual["w"], expected["w"])


@every_wrapped_kind
def test_multi_steps(name, params):
    tx = optimizers.plain(name)
    every_second = optax.MultiSteps(tx, every_k_schedule=2)
    state = every_second.init(params)
    first, second = gradients_of(params, 0), gradients_of(params, 1)
    update = jax.jit(every_second.update)
    updates, state = update(first, state, params, value=LOSS)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(second, state, params, value=LOSS)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = tx.update(mean, tx.init(params), params, value=LOSS)
    assert_close(updates, expected)


@pytest.mark.parametrize("name", optimizers.in_kind(*DECAYS_AS_ADAMW))
def test_inject_hyperparams(name, params):
    factory = functools.partial(optimizers.make, name)

    def build(learning_rate, weight_decay):
        return factory(learning_rate=learning_rate, weight_decay=weight_decay)

    tx = optax.inject_hyperparams(build)(learning_rate=0.5, weight_decay=0.1)
    state = tx.init(params)
    gradients = gradients_of(params)
    update = jax.jit(tx.update)
    before, _ = update(gradients, state, params, value=LOSS)
    state.hyperparams["learning_rate"] = jnp.asarray(0.25)
    state.hyperparams["weight_decay"] = jnp.asarray(0.3)
    after, _ = update(gradients, state, params, value=LOSS)
    expected = jax.tree.map(lambda u, p: 0.5 * u - 0.25 * 0.2 * p, before, params)
    assert_close(after, expected)


@every_wrapped_kind
def test_inject_hyperparams_takes_the_constructor_itself(name, params):
    case = OPTIMIZERS[name]
    functions = [name for name, value in case.arguments.items() if callable(value)]
    tx = optax.inject_hyperparams(case.constructor, static_args=functions)(
        **case.arguments,
        weights=optimizers.weights(name),
        learning_rate=optax.constant_schedule(0.5),
    )
    updates, _ = jax.jit(tx.update)(gradients_of(params), tx.init(params), params, value=LOSS)
    plain = optimizers.make(name, learning_rate=0.5)
    expected, _ = plain.update(gradients_of(params), plain.init(params), params, value=LOSS)
    assert_close(updates, expected)


@every_wrapped_kind
def test_apply_if_finite(name, params):
    tx = optimizers.plain(name)
    careful = optax.apply_if_finite(tx, max_consecutive_errors=3)
    state = careful.init(params)
    gradients = gradients_of(params)
    bad = {**gradients, "w": gradients["w"].at[0, 0].set(jnp.nan)}
    update = jax.jit(careful.update)
    updates, after = update(bad, state, params, value=LOSS)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert_equal(after.inner_state, state.inner_state)
    actual, _ = update(gradients, state, params, value=LOSS)
    expected, _ = tx.update(gradients, tx.init(params), params, value=LOSS)
    assert_close(actual, expected)


# -- transformations of JAX ---------------------------------------------------------------------


@every_wrapped_kind
def test_scan_equals_a_loop(name, params):
    tx = optimizers.plain(name)
    steps = 3
    gradients = [gradients_of(params, t) for t in range(steps)]
    losses = jnp.asarray([LOSS / (t + 1) for t in range(steps)])

    def body(carry, inputs):
        params, state = carry
        gradient, loss = inputs
        updates, state = tx.update(gradient, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *gradients)
    actual, _ = jax.jit(lambda c: jax.lax.scan(body, c, (stacked, losses)))(
        (params, tx.init(params))
    )
    assert_close(actual, run(tx.update, params, tx.init(params), steps))


@every_kind
def test_vmap_over_seeds(name, params):
    tx = optimizers.plain(name)
    seeds = [optimizers.random_like(params, seed) for seed in (1, 2, 3)]
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)  # noqa: E731
    losses = jnp.asarray([1.0, 2.0, 3.0])

    step = functools.partial(_with_loss, tx)
    together = jax.jit(jax.vmap(step, in_axes=(0, None, 0, 0, None)))
    params = stack(seeds)
    actual = run(
        lambda gradients, state, params, value: together(losses, gradients, state, params, value),
        params,
        jax.vmap(tx.init)(params),
        2,
        like=PARAMS,
    )
    expected = [
        run(functools.partial(step, loss), p, tx.init(p), 2)
        for p, loss in zip(seeds, losses, strict=True)
    ]
    assert_close(actual, stack(expected))


def _with_loss(tx, loss, gradients, state, params, value):
    return tx.update(gradients, state, params, value=loss * value)


@every_wrapped_kind
def test_jit_with_donation(name, params):
    tx = optimizers.plain(name)
    expected = run(tx.update, params, tx.init(params), 3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients, loss):
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    actual, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for t in range(3):
        before = state
        actual, state = step(actual, state, gradients_of(params, t), LOSS / (t + 1))
        assert all(x.is_deleted() for x in jax.tree.leaves(before.accumulators.momentum))
    assert_close((actual, state), expected)


# -- leaves -------------------------------------------------------------------------------------


@every_wrapped_kind
def test_flax_boxes(name, params):
    """Boxes keep their place in the state, and every axis of the state keeps its name."""
    tx = optimizers.plain(name)
    sizes = {"in": 3, "out": 4, None: None}
    names = {"w": ("in", "out"), "b": ("out",)}
    box = lambda tree: {k: nn.Partitioned(x, names[k]) for k, x in tree.items()}  # noqa: E731
    state = tx.init(box(params))
    gradients = gradients_of(params)
    for _ in range(2):
        found = boxes_of(state.accumulators)
        assert len(found) >= len(params) * len(optimizers.averages(state))
        for x in found:
            assert len(x.names) == x.value.ndim
            for axis, size in zip(x.names, x.value.shape, strict=True):
                assert sizes[axis] in (None, size)
        for tree in optimizers.averages(state):
            for k, x in tree.items():  # of AdamW's leaves, Celo2 keeps one momentum alone
                if x.value.shape == params[k].shape:
                    assert x.names == names[k]
        updates, state = tx.update(box(gradients), state, box(params), value=LOSS)
    unboxed = tx.init(params)
    for _ in range(2):
        expected, unboxed = tx.update(gradients, unboxed, params, value=LOSS)
    assert {k: x.names for k, x in updates.items()} == names
    assert_close(nn.unbox(updates), expected)
    assert_close(nn.unbox(state), unboxed)


def test_names_of_row_and_column_follow_the_axes(params):
    tx = optimizers.plain("small_fc_lopt")
    leaf = nn.Partitioned(jnp.ones((2, 5, 3)), ("batch", "long", "short"))
    accumulators = tx.init({"w": leaf}).accumulators
    assert accumulators.row["w"].value.shape == (3, 2, 3)
    assert accumulators.row["w"].names == (None, "batch", "short")
    assert accumulators.column["w"].value.shape == (3, 2, 5)
    assert accumulators.column["w"].names == (None, "batch", "long")


@every_optimizer
def test_none_and_masked_nodes_are_passed_over(name, params):
    tx = optimizers.plain(name)
    with_holes = {**params, "none": None, "masked": optax.MaskedNode()}
    gradients = {**gradients_of(params), "none": None, "masked": optax.MaskedNode()}
    updates, state = tx.update(gradients, tx.init(with_holes), with_holes, value=LOSS)
    assert updates["none"] is None
    assert isinstance(updates["masked"], optax.MaskedNode)
    assert all(tree["none"] is None for tree in optimizers.averages(state))
    expected, _ = tx.update(gradients_of(params), tx.init(params), params, value=LOSS)
    assert_close({k: updates[k] for k in params}, expected)


@every_kind
def test_parameters_without_gradient_stay(name, params):
    tx = optimizers.plain(name)
    params = {**params, "frozen": jnp.ones((2, 3))}
    gradients = {**gradients_of(params), "frozen": None}
    state = tx.init(params)
    updates, after = tx.update(gradients, state, params, value=LOSS)
    assert updates["frozen"] is None
    assert np.abs(updates["w"]).max() > 0
    for tree, old in zip(after.accumulators.momentum, state.accumulators.momentum, strict=True):
        assert_equal(tree["frozen"], old["frozen"])
    assert jax.tree.structure(after) == jax.tree.structure(state)
    moved = optax.apply_updates(
        {k: params[k] for k in ("w", "b")}, {k: updates[k] for k in ("w", "b")}
    )
    assert np.abs(moved["w"] - params["w"]).max() > 0


@every_optimizer
def test_no_parameters_at_all(name):
    tx = optimizers.plain(name)
    updates, _ = tx.update({}, tx.init({}), {}, value=LOSS)
    assert updates == {}


@every_kind
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.nightly)]
)
def test_half_precision_parameters(name, dtype, params):
    """Updates come in the parameters' dtype; everything inside is float32."""
    tx = optimizers.plain(name)
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    gradients = jax.tree.map(lambda x: x.astype(dtype), gradients_of(params))
    updates, state = tx.update(gradients, tx.init(half), half, value=LOSS)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    for x in jax.tree.leaves(state):
        assert x.dtype in (jnp.float32, jnp.int32)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    expected, expected_state = tx.update(
        wide(gradients), tx.init(wide(half)), wide(half), value=LOSS
    )
    assert_close(updates, expected, float(jnp.finfo(dtype).eps))
    assert_close(state, expected_state)


def test_modules_are_attributes_of_the_package():
    code = """if True:
        import sys, lopt_jax
        heavy = {"flax", "lopt_jax.flax", "lopt_jax.meta", "sklearn"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        print(lopt_jax.flax.TrainState, lopt_jax.meta, lopt_jax.sharding.distributed)
        assert dir(lopt_jax) == sorted(lopt_jax.__all__)
        assert not {"Any", "TYPE_CHECKING", "importlib", "engine", "rule"} & set(dir(lopt_jax))
        assert {"diagnostics", "flax", "meta", "mup", "plot", "sharding", "weights"} <= set(
            dir(lopt_jax)
        )
        assert all(getattr(lopt_jax, name) is not None for name in dir(lopt_jax))
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", [lopt_jax, pallas_kernels])
def test_packages_say_that_they_are_typed(package):
    assert (Path(package.__file__).parent / "py.typed").is_file()


@every_kind
def test_scalar_and_empty_leaves(name, params):
    tx = optimizers.plain(name)
    params = {
        "b": params["b"],
        "scalar": jnp.asarray(2.0),
        "ones": jnp.ones((1, 1)),
        "empty": jnp.zeros((0,)),
        "empty_matrix": jnp.zeros((0, 3)),
    }
    state = tx.init(params)
    moved, state = run(tx.update, params, state, 2)
    for leaf, value in moved.items():
        assert value.shape == params[leaf].shape
        assert np.isfinite(value).all()
    for leaf in ("scalar", "ones"):
        assert np.all(moved[leaf] != params[leaf])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@every_kind
def test_numpy_arrays_are_parameters_too(name, params):
    tx = optimizers.plain(name)
    gradients = jax.tree.map(np.asarray, gradients_of(params))
    updates, _ = tx.update(gradients, tx.init(PARAMS), PARAMS, value=np.float32(LOSS))
    expected, _ = tx.update(gradients_of(params), tx.init(params), params, value=LOSS)
    assert_close(updates, expected, 1e-6)


# -- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", optimizers.in_kind(*(n for n, case in OPTIMIZERS.items() if not case.has_recipe))
)
def test_schedule(name, params):
    """With parameters held fixed, the update is the schedule's value times that at rate one."""

    def made(slope):
        return optimizers.make(name, learning_rate=lambda count: 1 / (1 + slope * count))

    @jax.jit
    def one_step(slope, gradients, state):
        return made(slope).update(gradients, state, params, value=LOSS)

    def updates_at(slope):
        state, out = made(slope).init(params), []
        for step in range(2):
            updates, state = one_step(slope, gradients_of(params, step), state)
            out.append(updates)
        return out

    first, second = updates_at(0.0)
    assert_close(updates_at(3.0), [first, jax.tree.map(lambda u: u / 4, second)], 1e-6)


MASKS = {
    "function": (lambda params: jax.tree.map(lambda x: x.ndim > 1, params), {"w": 1, "b": 0}),
    "all": (None, {"w": 1, "b": 1}),
    "tree": ({"w": False, "b": True}, {"w": 0, "b": 1}),
    "truth": ({"w": 0, "b": 3}, {"w": 0, "b": 1}),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if always else pytest.mark.nightly)
        for name in DECAYS_AS_ADAMW
        for kind in MASKS
        for always in [name == "small_fc_lopt" or (name in KINDS and kind == "function")]
    ],
)
def test_weight_decay_is_that_of_adamw(name, kind, params):
    """It adds -learning_rate * weight_decay * parameter: what optax.adamw adds, as measured."""
    rate, decay = 0.5, 0.1
    mask, expected_mask = MASKS[kind]
    gradients = gradients_of(params)

    def difference(make):
        @jax.jit
        def update(weight_decay):
            tx = make(weight_decay)
            return tx.update(gradients, tx.init(params), params, value=LOSS)[0]

        return jax.tree.map(lambda a, b: np.asarray(b - a), update(0.0), update(decay))

    actual = difference(
        lambda wd: optimizers.make(
            name, learning_rate=rate, weight_decay=wd, weight_decay_mask=mask
        )
    )
    of_adamw = difference(
        lambda wd: optax.with_extra_args_support(optax.adamw(rate, weight_decay=wd, mask=mask))
    )
    for leaf, on in expected_mask.items():
        exact = -rate * decay * PARAMS[leaf] * on
        np.testing.assert_allclose(actual[leaf], exact, atol=3e-7)
        np.testing.assert_allclose(of_adamw[leaf], exact, atol=3e-7)


@every_optimizer
def test_wrong_arguments_name_themselves(name, params):
    for argument, value, error in (
        ("learning_rate", -1.0, ValueError),
        ("learning_rate", float("nan"), ValueError),
        ("learning_rate", "fast", TypeError),
        ("weight_decay", -0.1, ValueError),
        ("weight_decay", None, TypeError),
        ("accumulator_dtype", jnp.int32, TypeError),
        ("accumulator_dtype", "wide", TypeError),
        ("backend", "abacus", ValueError),
        ("precision", "exact", ValueError),
    ):
        with pytest.raises(error, match=argument):
            optimizers.make(name, **{argument: value})
    with pytest.raises(TypeError, match="weights"):
        OPTIMIZERS[name].make(weights=3)
    with pytest.raises(lopt_jax.WeightsError, match="no_such_folder"):
        OPTIMIZERS[name].make(weights="./no_such_folder")
    for stacked_axes in (3, -1, True, {"w": 1, "b": 2}):
        with pytest.raises(ValueError, match="stacked_axes"):
            optimizers.make(name, stacked_axes=stacked_axes).init(params)


@every_optimizer
@pytest.mark.parametrize("shape", [(4, 3), (12,), (1, 3, 4), (6, 4)])
def test_gradients_of_another_shape_are_refused(name, shape, params):
    tx = optimizers.plain(name)
    gradients = gradients_of(params) | {"w": jnp.ones(shape)}
    with pytest.raises(ValueError, match=r"updates: expected the shape of the param \['w'\]"):
        tx.update(gradients, tx.init(params), params, value=LOSS)


@every_optimizer
def test_state_of_other_parameters_is_refused(name, params):
    tx = optimizers.plain(name)
    if not optimizers.averages(tx.init(params)):
        pytest.skip("its state is that of all parameters")
    other = {"b": params["b"], "w": params["w"].T}
    with pytest.raises(ValueError, match=r"state: expected the shape \(4, 3\) at .*\['w'\]"):
        tx.update(gradients_of(other), tx.init(params), other, value=LOSS)
    renamed = {"b": params["b"], "z": params["w"]}
    with pytest.raises(ValueError, match=r"state: .* expected a tree like the params"):
        tx.update(gradients_of(renamed), tx.init(params), renamed, value=LOSS)
    with pytest.raises(TypeError, match=r"state: expected a .*State, .* found NoneType"):
        tx.update(gradients_of(params), None, params, value=LOSS)


@every_optimizer
def test_gradients_of_another_structure_are_refused(name, params):
    tx = optimizers.plain(name)
    with pytest.raises(ValueError, match="updates: expected a tree like the params"):
        tx.update({"w": params["w"]}, tx.init(params), params, value=LOSS)


@every_optimizer
def test_leaves_that_are_no_real_numbers_are_named(name, params):
    tx = optimizers.plain(name)
    with pytest.raises(TypeError, match=r"params: .* complex64 in the leaf \['w'\]"):
        tx.init(params | {"w": params["w"] + 1j})
    with pytest.raises(TypeError, match=r"params: .* str in the leaf \['w'\]"):
        tx.init(params | {"w": "text"})


@every_kind
def test_python_numbers_are_parameters(name):
    tx = optimizers.plain(name)
    step = lambda p, g: tx.update(g, tx.init(p), p, value=LOSS)[0]  # noqa: E731
    expected = step({"s": jnp.asarray(0.5)}, {"s": jnp.asarray(0.1)})
    assert_equal(step({"s": 0.5}, {"s": 0.1}), expected)


@every_optimizer
def test_a_state_keeps_its_dtypes_under_64_bits(name):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
        tx = optimizers.make(name)
        state = tx.init(params)
        update = lambda s: tx.update(params, s, params, value=LOSS)[1]  # noqa: E731
        dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
        assert dtypes(jax.eval_shape(update, state)) == dtypes(state)


def test_accumulation_recovers_from_an_infinite_loss(params):
    """As VeLO does without it: what was averaged once is forgotten."""
    tx = optimizers.make("velo", gradient_accumulation=2)
    state, update = tx.init(params), jax.jit(tx.update)
    for loss in (1.0, 1.0, 1.0, np.inf, 1.0, 1.0):
        updates, state = update(gradients_of(params), state, params, value=loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    assert np.isfinite(state.loss_sum)


def test_counts_are_integers_of_any_kind():
    for every in (np.int64(2), np.int32(2)):
        optimizers.make("velo", gradient_accumulation=every)
    with pytest.raises(TypeError, match=r"gradient_accumulation: .* static_args"):
        optimizers.make("velo", gradient_accumulation=jnp.int32(2))


def test_inject_hyperparams_is_told_what_is_static(params):
    inject = functools.partial(optax.inject_hyperparams, lopt_jax.small_fc_lopt)
    arguments = {"weights": optimizers.weights("small_fc_lopt"), "stacked_axes": 1}
    with pytest.raises(ValueError, match=r"stacked_axes: .* static_args"):
        inject(static_args=("weights",))(**arguments).init(params)
    tx = inject(static_args=("weights", "stacked_axes"))(**arguments)
    expected = optimizers.make("small_fc_lopt", stacked_axes=1)
    step = lambda tx: jax.jit(tx.update)(gradients_of(params), tx.init(params), params)[0]  # noqa: E731
    assert_close(step(tx), step(expected))


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("adam_betas", (1.0, 0.9), ValueError),
        ("adam_betas", (-0.1, 0.9), ValueError),
        ("adam_betas", 0.9, TypeError),
        ("adam_epsilon", "small", TypeError),
        ("label_fn", "adamw", TypeError),
    ],
)
def test_wrong_settings_of_adamw_name_themselves(argument, value, error):
    with pytest.raises(error, match=argument):
        optimizers.make("celo2", **{argument: value})


@every_optimizer
def test_rates_are_numbers(name, params):
    with pytest.raises(ValueError, match=r"learning_rate: .* shape \(2,\)"):
        optimizers.make(name, learning_rate=jnp.ones((2,)))
    tx = optimizers.make(name, learning_rate=lambda count: jnp.ones((2,)))
    with pytest.raises(ValueError, match=r"learning_rate: .* shape \(2,\)"):
        tx.update(gradients_of(params), tx.init(params), params, value=LOSS)


@every_optimizer
def test_wrong_loss_is_named(name, params):
    if not OPTIMIZERS[name].reads_loss:
        pytest.skip("reads no loss")
    tx = optimizers.plain(name)
    with pytest.raises(ValueError, match="value"):
        tx.update(gradients_of(params), tx.init(params), params, value=jnp.ones((3,)))


@pytest.mark.parametrize("name", [n for n, c in OPTIMIZERS.items() if "num_steps" in c.arguments])
def test_wrong_num_steps_names_itself(name):
    constructor, weights = getattr(lopt_jax, name), optimizers.weights(name)
    for value, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), ("many", TypeError)):
        with pytest.raises(error, match="num_steps"):
            constructor(value, weights)


@every_optimizer
def test_weights_of_another_architecture_are_refused(name):
    other = "elo" if OPTIMIZERS[name].architecture != "elo" else "velo"
    weights = lopt_jax.Weights(other, {}, {})
    with pytest.raises(lopt_jax.WeightsError, match=other):
        OPTIMIZERS[name].make(weights=weights)


@every_kind
def test_accumulator_dtype(name, params):
    tx = optimizers.make(name, accumulator_dtype=jnp.bfloat16)
    state = tx.init(params)
    dtypes = lambda state: jax.tree.map(lambda x: x.dtype, state)  # noqa: E731
    at_first = dtypes(state)
    for tree in optimizers.averages(state)[:1]:  # of the momenta, which it can hold
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    for _ in range(2):
        updates, state = tx.update(gradients_of(params), state, params, value=LOSS)
        assert dtypes(state) == at_first
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


# -- stacked axes -------------------------------------------------------------------------------


@every_kind
def test_stacked_axes_equal_separate_leaves(name, params):
    """A scanned model's leaves (layers, ...) are updated as the layers' own leaves are."""
    layers = 2
    # Newton-Schulz in float32 errs by up to 2e-6 of the largest element here: twice that
    tolerance = 4e-6 if name in ("celo2", "elo_celo2", "lopt") else 1e-6
    stacked = {
        "kernel": optimizers.random_like(jnp.zeros((layers, 3, 4)), 1),
        "bias": optimizers.random_like(jnp.zeros((layers, 4)), 2),
        "head": params["w"],
    }
    separate = {
        f"{leaf}_{i}": stacked[leaf][i] for leaf in ("kernel", "bias") for i in range(layers)
    } | {"head": params["w"]}
    gradients = {k: [gradients_of(v, t) for t in range(2)] for k, v in stacked.items()}

    tx = optimizers.make(name, stacked_axes={"kernel": 1, "bias": 1, "head": 0})
    plain = optimizers.plain(name)
    state, plain_state = tx.init(stacked), plain.init(separate)
    for t in range(2):
        g = {k: v[t] for k, v in gradients.items()}
        parts = {k: g[k.split("_")[0]][int(k.split("_")[1])] for k in separate if k != "head"}
        updates, state = tx.update(g, state, stacked, value=LOSS)
        expected, plain_state = plain.update(
            parts | {"head": g["head"]}, plain_state, separate, value=LOSS
        )
        stacked, separate = (
            optax.apply_updates(stacked, updates),
            optax.apply_updates(separate, expected),
        )
        for leaf in separate:
            kind, _, i = leaf.partition("_")
            actual = updates[kind][int(i)] if i else updates[kind]
            assert_close(actual, expected[leaf], tolerance)


def test_stacked_axes_as_int_tree_and_function():
    params = {"a": jnp.zeros((2, 3, 4)), "b": jnp.zeros((2, 5))}

    def by_path(path, leaf):
        return 1 if path[0].key == "a" else 0

    everywhere = tensors_of(params, 1)
    assert [(t.stack, t.shape) for t in everywhere] == [((2,), (3, 4)), ((2,), (5,))]
    chosen = tensors_of(params, by_path)
    assert [(t.stack, t.shape) for t in chosen] == [((2,), (3, 4)), ((), (2, 5))]
    assert chosen == tensors_of(params, {"a": 1, "b": 0})
    nested = {"layers": params, "head": jnp.zeros((5, 3))}
    prefix = tensors_of(nested, {"layers": 1, "head": 0})
    assert [(t.stack, t.shape) for t in prefix] == [((), (5, 3)), ((2,), (3, 4)), ((2,), (5,))]


# -- settings of the caller -----------------------------------------------------------------------


def program_of(tx):
    """The update as it is handed to XLA, for leaves of all kinds."""
    kinds = {"w": ((3, 4), "float32"), "b": ((4,), "bfloat16"), "s": ((), "float16")}
    params = {name: jax.ShapeDtypeStruct(*kind) for name, kind in kinds.items()}
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(functools.partial(tx.update, value=jnp.float32(LOSS)))
    return update.lower(params, state, params).as_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in OPTIMIZERS), ("velo", {"gradient_accumulation": 2})],
)
def test_promotion_as_the_caller_has_it_changes_nothing(name, options):
    """Neither does 64 bit make anything wider."""
    make = functools.partial(optimizers.make, name, weight_decay=0.1, **options)
    expected = program_of(make())
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert program_of(make()) == expected
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float32, PARAMS)
        state = jax.eval_shape(make().init, params)
        updated = jax.eval_shape(
            functools.partial(make().update, value=LOSS), params, state, params
        )
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert dtypes(updated) == dtypes((params, state))
    assert {x.dtype.itemsize for x in jax.tree.leaves(updated)} == {4}


# -- over the weights themselves ----------------------------------------------------------------


@every_kind
def test_is_built_inside_jit_vmap_and_grad_over_its_weights(name, params):
    params = {"w": params["w"]}
    weights = optimizers.weights(name)

    def loss(weights):
        tx = OPTIMIZERS[name].make(weights=weights)
        moved, _ = run(tx.update, params, tx.init(params), 1)
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(moved))

    compiled = jax.jit(jax.value_and_grad(loss))
    value, gradient = compiled(weights)
    assert isinstance(gradient, lopt_jax.Weights)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    tx = OPTIMIZERS[name].make(weights=weights)
    moved, _ = run(tx.update, params, tx.init(params), 1)
    np.testing.assert_allclose(value, np.sum(np.square(moved["w"])), rtol=1e-5)

    scaled = [jax.tree.map(lambda x, s=s: s * x, weights) for s in (1.0, 0.5)]
    values = jax.jit(jax.vmap(loss))(jax.tree.map(lambda *xs: jnp.stack(xs), *scaled))
    np.testing.assert_allclose(values, [compiled(w)[0] for w in scaled], rtol=1e-5)

    # the derivative along the weights themselves, against a central difference
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(weights), strict=True)
    slope = sum(jnp.vdot(g, w) for g, w in pairs)
    sides = [compiled(jax.tree.map(lambda x, s=s: s * x, weights))[0] for s in (1.01, 0.99)]
    assert abs(slope) > 0
    np.testing.assert_allclose(slope, (sides[0] - sides[1]) / 0.02, rtol=0.05, atol=1e-3)


# -- accuracy and memory ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_fc_lopt", "velo", "celo_adam"])
def test_large_leaf_is_accurate(name):
    """Sums over four million elements keep float32 accuracy, against the same rule in float64."""
    shape = (2048, 2048)
    params = {"w": optimizers.random_like(jax.ShapeDtypeStruct(shape, jnp.float32), 0)}
    gradients = [
        {"w": 0.01 + optimizers.random_like(params["w"], seed, scale=0.1)} for seed in (1, 2)
    ]

    def moved(dtype):
        tx = optimizers.make(name, accumulator_dtype=dtype)
        cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)  # noqa: E731
        state = tx.init(cast(params))
        for gradient in gradients:
            updates, state = tx.update(cast(gradient), state, cast(params), value=LOSS)
        return updates["w"], state

    single, single_state = moved(jnp.float32)
    with jax.enable_x64(True):
        double, double_state = moved(jnp.float64)
        assert double.dtype == jnp.float64
        assert_close(single, double, 1e-5)
        assert_close(single_state.accumulators, double_state.accumulators, 1e-5)


@pytest.mark.parametrize("name", ["small_fc_lopt", "velo", "nn_adam", "rnn_mlp_lopt"])
@pytest.mark.parametrize("donated", [(), pytest.param((0, 1), marks=pytest.mark.nightly)])
def test_temporaries_of_a_large_leaf(name, donated):
    """At most four times the leaf's bytes, at the sizes of the released weights."""
    config = {
        "small_fc_lopt": {"hidden_size": 32, "hidden_layers": 2},
        "velo": {
            "hidden_size": 4,
            "hidden_layers": 2,
            "lstm_hidden_size": 512,
            "param_inits": 256,
        },
    }.get(name, {})
    case = OPTIMIZERS[name]
    weights = jax.tree.map(
        lambda shape: np.zeros(shape, np.float32),
        expected_shapes(case.architecture, config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tx = case.make(weights=lopt_jax.Weights(case.architecture, config, weights))
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, gradients, loss):
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=donated).lower(params, state, params, 1.0).compile()
    leaf = 4 * 4096 * 4096
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * leaf


# -- checkpoints --------------------------------------------------------------------------------


def continued(folder, names):
    """Restores each optimizer's run at its second step, continues it, and saves the end."""
    for name in names:
        tx = optimizers.plain(name)
        params = jax.tree.map(jnp.asarray, PARAMS)
        like = jax.eval_shape(lambda p, tx=tx: (p, tx.init(p)), params)
        with ocp.StandardCheckpointer() as checkpointer:
            params, state = checkpointer.restore(Path(folder) / f"{name}_middle", like)
        end = run(tx.update, params, state, 2, start=2)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / f"{name}_end", end)


OTHERS = [name for name in OPTIMIZERS if name not in optimizers.REPRESENTATIVES]


@pytest.mark.parametrize(
    "names",
    [optimizers.REPRESENTATIVES, pytest.param(OTHERS, marks=pytest.mark.nightly)],
    ids=["each kind", "others"],
)
def test_restored_in_a_new_process_continues_bitwise(names, tmp_path):
    ends = {}
    for name in names:
        tx = optimizers.plain(name)
        params = jax.tree.map(jnp.asarray, PARAMS)
        middle = run(tx.update, params, tx.init(params), 2)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / f"{name}_middle", middle)
        ends[name] = run(tx.update, *middle, 2, start=2)
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import {Path(__file__).stem} as t; t.continued({str(tmp_path)!r}, {names!r})",
        ],
        check=True,
        cwd=Path(__file__).parent,
        env=_environment(),
    )
    for name, end in ends.items():
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / f"{name}_end", end)
        assert_equal(restored, end)


def _environment():
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
