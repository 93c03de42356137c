"""What is wrong with arguments, trees, leaves and states is said before a number is made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from flax.core import FrozenDict
from optimizers import OPTIMIZERS, REPRESENTATIVES

import lopt_jax

LOSS = 1.5
PARAMS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "b": np.ones(4, np.float32)}
GRADIENTS = {"w": 0.1 * PARAMS["w"], "b": 0.1 * PARAMS["b"]}

every_kind = pytest.mark.parametrize("name", REPRESENTATIVES)


def update(tx, gradients=None, params=None, state=None):
    """The updates of one step, shapes alone."""
    params = PARAMS if params is None else params
    gradients = GRADIENTS if gradients is None else gradients
    state = tx.init(params) if state is None else state
    return jax.eval_shape(lambda: tx.update(gradients, state, params, value=LOSS)[0])


# -- leaves ---------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", ["int32", "bool", "int4", "float8_e4m3fn", "float8_e5m2"])
def test_params_that_small_steps_do_not_change_have_no_gradients(name, dtype):
    """`optax.adamw` makes NaN of some, truncates others, and flips bools."""
    tx = optimizers.plain(name)
    params = PARAMS | {"n": jnp.ones((2, 3)).astype(dtype)}
    with pytest.raises(TypeError, match=rf"updates: expected None for \['n'\], .* {dtype}.*freeze"):
        update(tx, GRADIENTS | {"n": jnp.ones((2, 3))}, params)
    assert update(tx, GRADIENTS | {"n": None}, params)["n"] is None


@every_kind
def test_complex_gradients_are_named(name):
    with pytest.raises(TypeError, match=r"updates: .* real numbers, found complex64 for \['w'\]"):
        update(optimizers.plain(name), GRADIENTS | {"w": PARAMS["w"] * 1j})


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 2}])
def test_complex_gradients_are_not_averaged(options):
    tx = optimizers.make("velo", **options)
    with pytest.raises(TypeError, match="updates: expected real numbers"):
        update(tx, GRADIENTS | {"w": PARAMS["w"] * 1j})


@every_kind
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int4", "int32", "bool"])
def test_gradients_of_few_bits_are_the_numbers_that_they_are(name, dtype):
    tx = optimizers.plain(name)
    short = jax.tree.map(lambda x: jnp.sign(x).astype(dtype), PARAMS)
    step = lambda g: tx.update(g, tx.init(PARAMS), PARAMS, value=LOSS)[0]  # noqa: E731
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), short)
    jax.tree.map(np.testing.assert_array_equal, step(short), step(wide))


@pytest.mark.parametrize(
    "leaf",
    [
        np.ones(2, ">f4"),
        np.ones(2, np.longdouble),
        np.array("text"),
        np.array([None]),
        np.array(["2026-01-01"], "datetime64[D]"),
    ],
)
def test_arrays_of_no_numbers_are_named(leaf):
    tx = optimizers.plain("small_fc_lopt")
    with pytest.raises(TypeError, match=r"params: expected an array of numbers.*\['x'\]"):
        tx.init({"x": leaf})
    with pytest.raises(TypeError, match=r"params: expected an array of numbers.*\['x'\]"):
        lopt_jax.describe(lopt_jax.small_fc_lopt(), {"x": leaf})


@every_kind
@pytest.mark.parametrize("place", ["updates", "params", "value"])
def test_bytes_in_another_order_are_no_other_numbers(name, place):
    """What jax has compiled for float32 reads them as they are: an update of zeros, and no word."""
    tx = optimizers.plain(name)
    given = {"updates": dict(GRADIENTS), "params": dict(PARAMS), "value": np.float32(LOSS)}
    state = tx.init(PARAMS)
    step = lambda: tx.update(given["updates"], state, given["params"], value=given["value"])  # noqa: E731
    step()
    swapped = lambda x: np.asarray(x).astype(">f4")  # noqa: E731
    given[place] = swapped(LOSS) if place == "value" else {k: swapped(x) for k, x in PARAMS.items()}
    with pytest.raises(TypeError, match=rf"^{place}: .*byte order.* >f4"):
        step()


def test_what_is_no_tree_of_arrays_is_named():
    with pytest.raises(TypeError, match=r"found object .* \(the whole tree\).*nnx.state"):
        optimizers.plain("small_fc_lopt").init(object())


# -- trees ----------------------------------------------------------------------------------------

MODEL = {"layers": [{"kernel": np.ones((2, 2)), "bias": np.ones(2)} for _ in range(40)]}


@pytest.mark.parametrize(
    ("gradients", "says"),
    [
        (
            {"layers": MODEL["layers"][:38]},
            r"it lacks \['layers'\]\[38\]\['bias'\], .*and 1 more\.$",
        ),
        (MODEL | {"head": np.ones(3)}, r"it has, and the params have not, \['head'\]\.$"),
        (
            {"layers": [*MODEL["layers"][:39], {"kernel": {"mu": np.ones((2, 2))}, "bias": None}]},
            r"it lacks \['layers'\]\[39\]\['kernel'\]; it has, .*\['kernel'\]\['mu'\]\.$",
        ),
        (FrozenDict(MODEL), r"its containers are others: expected PyTreeDef.*FrozenDict"),
        (None, r"it lacks .* and 77 more; it has, and the params have not, \(the whole tree\)\.$"),
    ],
)
def test_trees_that_differ_say_where(gradients, says):
    """The message is for people: no whole model in it."""
    tx = optimizers.plain("small_fc_lopt")
    state = jax.eval_shape(tx.init, MODEL)
    with pytest.raises(
        ValueError, match=f"(?m)^updates: expected a tree like the params; {says}"
    ) as e:
        jax.eval_shape(lambda s: tx.update(gradients, s, MODEL), state)
    assert len(str(e.value).partition("\n")[0]) < 400


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ({"w": True}, r"it lacks \['b'\]\.$"),
        ({"w": True, "b": True, "c": True}, r"it has, and the params have not, \['c'\]\.$"),
        ([True, False], r"it lacks \['b'\], \['w'\]; it has, .* \[0\], \[1\]\.$"),
    ],
)
def test_a_tree_that_is_no_prefix_says_where(mask, says):
    tx = optimizers.make("small_fc_lopt", weight_decay=0.1, weight_decay_mask=mask)
    with pytest.raises(ValueError, match=f"(?m)^weight_decay_mask: .* a prefix of it; {says}"):
        update(tx)


# -- states ---------------------------------------------------------------------------------------


def test_a_state_of_optax_is_said_to_be_one():
    tx = optimizers.plain("small_fc_lopt")
    for make, says in (
        (optax.adamw, "found a tuple, as the states of optax.chain"),
        (lambda _: optax.scale_by_adam(), r"found ScaleByAdamState, the state of .* optax\.$"),
    ):
        with pytest.raises(TypeError, match=f"(?m)state: expected a PerParameterState.*{says}"):
            update(tx, state=make(0.1).init(PARAMS))


def test_a_state_restored_without_a_target_is_said_to_be_one():
    with pytest.raises(TypeError, match=r"found a dict, as .* without a target.*eval_shape"):
        update(optimizers.plain("small_fc_lopt"), state={"count": 0})


def test_a_part_of_a_state_is_said_in_one_line():
    tx = optax.chain(optax.clip(1.0), optimizers.plain("small_fc_lopt"))
    inner = optimizers.plain("small_fc_lopt").init(PARAMS)
    with pytest.raises(TypeError, match="found Accumulators: ") as error:
        update(tx, state=tuple(inner))
    assert str(error.value).count("\n") <= 2  # what jax adds


# -- numbers --------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("learning_rate", np.inf, ValueError),
        ("learning_rate", 10**400, ValueError),
        ("learning_rate", jnp.float32(-1), ValueError),
        ("learning_rate", jnp.float32(np.nan), ValueError),
        ("learning_rate", jnp.complex64(1j), TypeError),
        ("learning_rate", np.array([0.1, 0.2]), ValueError),
        ("weight_decay", np.inf, ValueError),
        ("weight_decay", jnp.float32(-1), ValueError),
        ("weight_decay", np.complex64(1), TypeError),
        ("accumulator_dtype", None, TypeError),  # numpy's name for float64
        ("accumulator_dtype", "float8_e4m3fn", TypeError),
        ("precision", ["highest"], ValueError),
        ("backend", ["xla"], ValueError),
    ],
)
def test_numbers_that_are_none_are_named(name, argument, value, error):
    with pytest.raises(error, match=f"^{argument}: "):
        optimizers.make(name, **{argument: value})


@every_kind
@pytest.mark.parametrize("schedule", [lambda _: None, lambda _: "fast", lambda _: optax.sgd(0.1)])
def test_schedules_of_no_numbers_are_named(name, schedule):
    with pytest.raises(TypeError, match=r"^learning_rate: expected a number; found "):
        update(optimizers.make(name, learning_rate=schedule))


@pytest.mark.parametrize("name", [n for n, c in OPTIMIZERS.items() if "num_steps" in c.arguments])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (jnp.int32(0), ValueError),
        (jnp.int32(-3), ValueError),
        (jnp.float32(5.5), TypeError),
        (jnp.array([5]), ValueError),
        (np.array([5]), ValueError),
        (jnp.array(True), TypeError),
        (2**31, ValueError),
        (10**400, ValueError),
        ({"w": PARAMS["w"]}, TypeError),
    ],
)
def test_num_steps_that_are_none_are_named(name, value, error):
    with pytest.raises(error, match=r"^num_steps: ") as found:
        optimizers.make(name, num_steps=value)
    assert len(str(found.value)) < 300


@pytest.mark.parametrize("name", ["velo", "lopt"])
def test_num_steps_of_every_kind_that_is_one(name):
    last = 2**31 - 1 if name == "lopt" else 20
    for value in (last, np.int64(20), np.array(20), jnp.int32(20), jnp.float32(20)):
        update(optimizers.make(name, num_steps=value))


def test_numbers_may_be_arrays():
    """Those of one element, and those that have no value yet."""
    for value in (jnp.array([0.1]), np.float64(0.1), np.array(0.1)):
        update(optimizers.make("small_fc_lopt", learning_rate=value))
    jax.eval_shape(
        lambda x: update(optimizers.make("small_fc_lopt", learning_rate=x)), jnp.float32(-1)
    )


@pytest.mark.parametrize(
    ("constants", "error", "says"),
    [
        ({"matrix": "0.1"}, TypeError, "matrix: expected a number"),
        ({"decay": np.nan}, ValueError, "decay: expected a finite number"),
        ({"vector": -1}, ValueError, "vector: expected a finite number"),
        ({"horizon": 0}, ValueError, "horizon: expected a number above 0"),
        ({"adam_windows": (0.0, 1000.0)}, ValueError, "adam_windows: expected a number above 0"),
        ({"adam_windows": None}, TypeError, "adam_windows: expected two numbers"),
    ],
)
def test_constants_of_a_recipe_are_named(constants, error, says):
    with pytest.raises(error, match=f"^recipe: {says}"):
        lopt_jax.lopt(10, recipe=lopt_jax.Recipe(**constants))
    for norm in (None, np.inf):
        lopt_jax.lopt(10, recipe=lopt_jax.Recipe(max_gradient_norm=norm))


def test_calls_that_nobody_can_count_are_refused():
    with pytest.raises(ValueError, match=r"^gradient_accumulation: expected at most 2,147,483,647"):
        optimizers.make("velo", gradient_accumulation=10**12)


# -- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        {"w": "all", "b": True},
        {"w": 0.5, "b": 0},
        {"w": "yes", "b": False},
        {"w": PARAMS["w"] > 0, "b": True},
    ],
)
def test_masks_of_no_bools_are_named(mask):
    """They would all be true: half of a decay would be all of it."""
    tx = optimizers.make("small_fc_lopt", weight_decay=0.1, weight_decay_mask=mask)
    with pytest.raises(TypeError, match=r"^weight_decay_mask: expected True or False"):
        update(tx)


@pytest.mark.parametrize("name", ["small_fc_lopt", "lopt"])
def test_a_mask_that_inject_hyperparams_has_called_is_refused(name):
    """It takes the function for a schedule, and what that makes of the step decays nothing."""
    case = OPTIMIZERS[name]
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    arguments = {
        **case.arguments,
        "weights": optimizers.weights(name),
        "weight_decay_mask": matrices,
    }
    static = [key for key in arguments if key not in ("num_steps", "weight_decay_mask")]
    tx = optax.inject_hyperparams(case.constructor, static_args=static)(**arguments)
    with pytest.raises(TypeError, match=r"^weight_decay_mask: .*found False.*static_args"):
        update(tx)
    static.append("weight_decay_mask")
    update(optax.inject_hyperparams(case.constructor, static_args=static)(**arguments))


# -- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["adamw", "embedding", "norm", "bias", "vector", np.str_("adamw")])
def test_lopt_takes_labels_of_leaves_of_every_rank(role):
    params = PARAMS | {"s": np.float32(1)}
    tx = lopt_jax.lopt(10, label_fn=lambda path, leaf: role)
    assert {plan.rule for plan in tx.plans(params)} == {"adamw"}


@pytest.mark.parametrize("name", ["celo2", "lopt"])
@pytest.mark.parametrize("label", [3, ["adamw"], np.array(["adamw", "learned"]), "Adamw"])
def test_labels_that_are_none_are_named(name, label):
    tx = optimizers.make(name, label_fn=lambda path, leaf: label)
    with pytest.raises(ValueError, match=r"^label_fn: expected .*found .*|\['b'\]"):
        tx.init(PARAMS)


def test_celo2_takes_labels_of_some_leaves_as_lopt_does():
    some = optimizers.make("celo2", label_fn=lambda path, leaf: None)
    assert some.plans(PARAMS) == optimizers.plain("celo2").plans(PARAMS)


# -- the loss -------------------------------------------------------------------------------------


def test_a_loss_with_what_came_beside_it_is_named():
    tx = optimizers.plain("velo")
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"^value: expected the loss.*has_aux=True"):
        tx.update(GRADIENTS, state, PARAMS, value=(jnp.float32(1), {"accuracy": jnp.float32(1)}))
    with pytest.raises(TypeError, match=r"^value: expected the loss, a scalar; found complex64"):
        tx.update(GRADIENTS, state, PARAMS, value=jnp.complex64(1))


def test_the_message_for_a_missing_loss_names_wrappers_that_keep_it():
    tx = optimizers.plain("velo")
    for wrapper, name in (
        (optax.MultiSteps(tx, 2).gradient_transformation(), "MultiSteps"),
        (optax.contrib.split_real_and_imaginary(tx), "split_real_and_imaginary"),
    ):
        wrapped = optax.chain(optax.identity(), wrapper)
        with pytest.raises(ValueError, match=f"value=loss.*{name}"):
            update(wrapped)


# -- backends -------------------------------------------------------------------------------------


def test_lopt_with_weights_of_a_network_has_kernels():
    lopt_jax.lopt(10, weights=optimizers.weights("celo2"), backend="pallas")


def test_a_rate_in_place_of_weights_is_named():
    with pytest.raises(TypeError, match="learning_rate="):
        lopt_jax.lopt(100, 0.001)


@pytest.mark.parametrize("call", [lopt_jax.packed, lambda tx: lopt_jax.update_params(tx, 1, 2, 3)])
def test_what_is_no_transformation_is_named(call):
    with pytest.raises(TypeError, match=r"tx: expected an optax transformation, found NoneType"):
        call(None)
    with pytest.raises(TypeError, match=r"found function; call it: lopt\(\.\.\.\)"):
        call(lopt_jax.lopt)


# -- descriptions ---------------------------------------------------------------------------------


def test_describe_takes_python_numbers_and_packed_optimizers():
    tx = lopt_jax.lopt(10)
    assert lopt_jax.describe(tx, {"s": 1.0}).leaves[0].shape == ()
    params = {"w": np.ones((3, 4)), "b": np.ones(4)}
    assert lopt_jax.describe(lopt_jax.packed(tx), params) == lopt_jax.describe(tx, params)
    with pytest.raises(TypeError, match="describe: expected what a constructor"):
        lopt_jax.describe(lopt_jax.packed(optax.adam(1)), params)
    with pytest.raises(ValueError, match=r"width_multipliers: .* it lacks"):
        lopt_jax.describe(optimizers.make("mulo", width_multipliers={"w": 2.0}), params)


def test_diagnostics_of_another_tree_say_where():
    with pytest.raises(ValueError, match=r"updates: expected a tree like the params; it lacks"):
        lopt_jax.diagnostics.diagnose({"w": PARAMS["w"]}, (), PARAMS)


def test_describe_knows_the_mask_of_decay():
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    for mask in (matrices, {"w": True, "b": False}):
        tx = optimizers.make("small_fc_lopt", weight_decay=0.1, weight_decay_mask=mask)
        decays = {leaf.path: leaf.decay for leaf in lopt_jax.describe(tx, PARAMS).leaves}
        assert decays == {"['w']": 1.0, "['b']": 0.0}
    tx = lopt_jax.lopt(10, weight_decay_mask={"w": True})
    with pytest.raises(ValueError, match=r"weight_decay_mask: .* it lacks \['b'\]"):
        lopt_jax.describe(tx, PARAMS)
