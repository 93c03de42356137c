"""Arguments that every optimizer takes, traced; accumulator dtypes; states of another kind."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optimizers
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optimizers import OPTIMIZERS

import lopt_jax
from lopt_jax import controller
from lopt_jax.optimizers import velo as velo_module
from lopt_jax.optimizers.common import stored_dtype
from pallas_kernels import supports

LOSS = 1.5
PARAMS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "b": np.ones(4, np.float32)}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture
def params():
    return jax.tree.map(jnp.asarray, PARAMS)


# -- traced arguments ---------------------------------------------------------------------------

# What may be traced, with a value that is not the default; weights have a test of their own.
TRACED = {
    "num_steps": 12,
    "learning_rate": 0.5,
    "weight_decay": 0.1,
    "weight_decay_mask": {"w": True, "b": False},
    "width_multipliers": {"w": 2.0, "b": 1.0},
    "adam_learning_rate_mult": 0.5,
    "adam_weight_decay": 0.2,
    "adam_betas": (0.8, 0.9),
    "adam_epsilon": 1e-3,
    "max_gradient_norm": 0.1,
}
# What decides which program there is.
STATIC = {
    "gradient_accumulation",
    "accumulator_dtype",
    "stacked_axes",
    "backend",
    "precision",
    "label_fn",
    "matrix_axes",
    "recipe",
    "weights",
}


@every_optimizer
def test_every_argument_may_be_traced_or_is_static(name):
    signature = inspect.signature(OPTIMIZERS[name].constructor)
    assert set(signature.parameters) <= TRACED.keys() | STATIC


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in OPTIMIZERS), ("velo", {"gradient_accumulation": 2})],
)
def test_traced_arguments_are_those_of_python(name, options, params):
    """One program, whose arguments are all traced, is that of Python numbers."""
    signature = inspect.signature(OPTIMIZERS[name].constructor)
    arguments = {k: v for k, v in TRACED.items() if k in signature.parameters}
    gradients = optimizers.random_like(params, 1, scale=0.1)

    def updates(arguments):
        tx = optimizers.make(name, **options, **arguments)
        step = lambda state, _: tx.update(gradients, state, params, value=LOSS)[::-1]  # noqa: E731
        steps = options.get("gradient_accumulation", 1)
        _, updates = jax.lax.scan(step, tx.init(params), length=steps)
        return jax.tree.map(lambda x: x[-1], updates)

    shapes = jax.eval_shape(updates, arguments)
    assert {k: x.shape for k, x in shapes.items()} == {k: x.shape for k, x in params.items()}
    if not options and name != "celo2":
        return  # values of two: each program takes seconds to compile
    traced, expected = jax.jit(updates)(arguments), jax.jit(lambda: updates(arguments))()
    for key, want in expected.items():
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(traced[key], want, atol=2e-5 * np.abs(want).max())


WITHOUT_KERNELS = {
    "celo_adam": "its rule is Adam",
    "learnable_adam": "its rule is a few operations",
    "learnable_sgd": "its rule is a few operations",
    "learnable_sgdm": "its rule is a few operations",
    "lopt": "its rule is a few operations",
    "mlp_lopt": "they know rules of 3 momenta and one second moment alone",
    "nn_adam": "its rule is Adam",
    "rnn_mlp_lopt": "they know no network that answers an LSTM",
}


@every_optimizer
@pytest.mark.parametrize("backend", ["auto", "pallas", "xla"])
def test_describe_says_which_backend_and_why(name, backend, monkeypatch):
    """On a GPU that runs the kernels, of a leaf that is worth them."""
    monkeypatch.setattr(supports, "unsupported_reason", lambda *_, **__: None)
    if backend == "pallas" and name in WITHOUT_KERNELS:
        with pytest.raises(NotImplementedError, match=f"{name} .*{WITHOUT_KERNELS[name]}"):
            optimizers.make(name, backend=backend)
        return
    tx = optimizers.make(name, backend=backend)
    found = lopt_jax.describe(tx, {"w0": jax.ShapeDtypeStruct((256, 512), jnp.float32)})
    has_kernels = backend != "xla" and name not in WITHOUT_KERNELS
    assert [leaf.backend for leaf in found.leaves] == ["kernels" if has_kernels else "xla"]
    reason = WITHOUT_KERNELS.get(name, "")
    assert found.note.startswith(f"No fused kernels here: {reason}" if reason else "")
    assert bool(found.note) == bool(reason)


def test_describe_knows_the_decays_of_the_weights(monkeypatch):
    monkeypatch.setattr(supports, "unsupported_reason", lambda *_, **__: None)
    tx = reference.optimizer("adafac_mlp_lopt_decays")
    found = lopt_jax.describe(tx, {"w": jax.ShapeDtypeStruct((256, 512), jnp.float32)})
    assert "3 momenta" in found.note
    assert found.leaves[0].backend == "xla"


# -- gradients and states of another kind -------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4), (4,), (4, 3), ()])
@pytest.mark.parametrize("num_steps", [20, 300_000])
@pytest.mark.filterwarnings("ignore:VeLO was meta-trained")
def test_accumulation_refuses_gradients_of_another_shape(num_steps, shape, params):
    accumulation = 2 if num_steps == 20 else None
    tx = optimizers.make("velo", num_steps=num_steps, gradient_accumulation=accumulation)
    gradients = {"w": jnp.ones(shape), "b": params["b"]}
    for transformation in (tx, lopt_jax.packed(tx), optax.chain(tx)):
        state = jax.eval_shape(transformation.init, params)
        with pytest.raises(ValueError, match=r"updates: expected the shape of the param \['w'\]"):
            jax.eval_shape(
                lambda g, s, tx=transformation: tx.update(g, s, params, value=LOSS),
                gradients,
                state,
            )


def test_accumulation_keeps_its_dtypes_under_64_bits():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMS)
        tx = optimizers.make("velo", gradient_accumulation=2)
        state = jax.eval_shape(tx.init, params)
        after = jax.eval_shape(lambda s: tx.update(params, s, params, value=LOSS)[1], state)
        dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]  # noqa: E731
        assert dtypes(after) == dtypes(state)


# Optimizers whose states cannot be told apart: the same averages of the same params.
ALIKE = [{"small_fc_lopt", "elo", "mulo"}, {"celo2", "celo2_base", "elo_celo2", "lopt"}]


def kinds():
    """Optimizers, and wrappers of them, by name."""
    velo = optimizers.plain("velo")
    wide = {**optimizers.MLP, "lstm_hidden_size": 8, "param_inits": 2}
    shapes = optimizers.expected_shapes("velo", wide)
    zeros = jax.tree.map(
        lambda shape: np.zeros(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    return {name: optimizers.plain(name) for name in OPTIMIZERS} | {
        "accumulating velo": optimizers.make("velo", gradient_accumulation=2),
        "packed velo": lopt_jax.packed(velo),
        "packed accumulating velo": lopt_jax.packed(
            optimizers.make("velo", gradient_accumulation=2)
        ),
        "careful velo": lopt_jax.sharding.apply_if_finite(velo, 3),
        "stacked velo": optimizers.make("velo", stacked_axes=1),
        "wide velo": lopt_jax.velo(20, lopt_jax.Weights("velo", wide, zeros)),
        "celo2 with labels": optimizers.make("celo2", label_fn=lambda path, leaf: "adamw"),
    }


def test_states_of_another_kind_are_refused_in_one_sentence(params):
    transformations = kinds()
    states = {name: jax.eval_shape(tx.init, params) for name, tx in transformations.items()}
    for name, tx in transformations.items():
        for other, state in states.items():
            if name == other or any({name, other} <= alike for alike in ALIKE):
                continue
            with pytest.raises((TypeError, ValueError), match=r"^state: "):
                jax.eval_shape(lambda s, tx=tx: tx.update(params, s, params, value=LOSS), state)


def test_the_kind_of_a_state_is_said(params):
    plain = optimizers.plain("velo")
    accumulating = optimizers.make("velo", gradient_accumulation=2)
    with pytest.raises(TypeError, match=r"AccumulationState: .*gradient_accumulation"):
        plain.update(params, accumulating.init(params), params, value=LOSS)
    with pytest.raises(TypeError, match=r"AccumulationState, .* found ControlledState: .*VeLO"):
        accumulating.update(params, plain.init(params), params, value=LOSS)
    with pytest.raises(TypeError, match=r"PackedState: .*unpack_state"):
        plain.update(params, lopt_jax.packed(plain).init(params), params, value=LOSS)
    with pytest.raises(TypeError, match=r"PackedState, found ControlledState; pack_state"):
        lopt_jax.packed(plain).update(params, plain.init(params), params, value=LOSS)


# -- dtypes of accumulators ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_average_moves_in_the_dtype_that_keeps_it(dtype):
    """From every number of a binade, the average of zeros goes down, rounded to the nearest."""
    numbers = np.arange(1, 2, 2.0**-11).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else "f2")
    kept = {}
    for decay in (0.9, 0.95, 0.99, 0.999, 0.9999):
        after = (numbers.astype(np.float32) * np.float32(decay)).astype(numbers.dtype)
        kept[decay] = stored_dtype(jnp.dtype(dtype), (decay,), False) == dtype
        assert not kept[decay] or np.all(after < numbers)
        if np.all(after == numbers):
            assert not kept[decay]
    assert [d for d, is_kept in kept.items() if is_kept] == (
        [0.9, 0.95, 0.99] if dtype == "bfloat16" else [0.9, 0.95, 0.99, 0.999]
    )


def test_squares_need_the_exponents_of_float32():
    assert stored_dtype(jnp.dtype("float16"), (0.9,), True) == jnp.float32
    assert stored_dtype(jnp.dtype("bfloat16"), (0.9,), True) == jnp.bfloat16
    assert stored_dtype(jnp.dtype("float64"), (0.9999,), True) == jnp.float64


@pytest.mark.parametrize(
    ("name", "options"), [("celo_adam", {}), ("celo2", {"adam_betas": (0.9, 0.999)})]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_averages_of_many_steps_are_right_in_short_dtypes(name, options, dtype):
    """Ones, then zeros, as far as 0.999 forgets: the moments of Adam against numpy's."""
    steps, scale = 600, 1e-3
    tx = optimizers.make(name, accumulator_dtype=dtype, **options)
    params = {"b": jnp.ones((3,))}

    def step(state, gradient):
        return tx.update({"b": jnp.full((3,), gradient)}, state, params, value=LOSS)[1], None

    gradients = scale * np.repeat(np.float32([1, 0]), steps)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, gradients))(tx.init(params))
    beta = 0.999
    expected = scale**2 * (1 - beta**steps) * beta**steps
    np.testing.assert_allclose(state.accumulators.second_moment["b"], expected, rtol=1e-3)


# -- the loss -----------------------------------------------------------------------------------

reads_loss = pytest.mark.parametrize("name", [n for n, c in OPTIMIZERS.items() if c.reads_loss])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_loss_that_is_not_finite_is_left_out(bad, place):
    """The buffer is that of the other losses, to the bit."""
    losses, decays = [3.0, 2.0, 2.5, 1.0], controller.loss_decays(20)
    with_bad = [*losses[:place], bad, *losses[place:]]

    def after(losses):
        buffer, features = controller.init_loss_buffer(), []
        for loss in losses:
            buffer = controller.update_loss_buffer(buffer, jnp.float32(loss), decays)
            features.append(controller.loss_features(buffer, decays))
        return buffer, features

    (found, features), (expected, _) = after(with_bad), after(losses)
    assert all(map(np.array_equal, found, expected))
    assert np.isfinite(features).all()


@reads_loss
def test_an_optimizer_recovers_from_a_bad_loss(name, params):
    tx = optimizers.plain(name)
    state = tx.init(params)
    for loss in (np.nan, 1.0, -np.inf, np.nan, 1.0):
        updates, state = tx.update(params, state, params, value=jnp.float32(loss))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
        assert np.abs(updates["w"]).max() > 0
    assert int(state.loss.count) == 2


@reads_loss
def test_the_message_for_a_missing_loss_names_the_train_state_that_keeps_it(name, params):
    from flax.training.train_state import TrainState

    state = TrainState.create(apply_fn=None, params=params, tx=optimizers.plain(name))
    with pytest.raises(
        ValueError, match=rf"{name} .*keep value=.*flax\.training.*TrainState \(lopt_jax\.flax"
    ):
        state.apply_gradients(grads=params, value=LOSS)


@reads_loss
def test_a_loss_of_one_device_with_gradients_of_all_is_refused(name, params):
    """Where types say what differs between devices; `pmap` cannot know."""
    tx = optimizers.plain(name)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    state = jax.eval_shape(tx.init, params)

    def step(mean, gradients, state, params, losses):
        loss = jax.lax.pmean(losses[0], "data") if mean else losses[0]
        return jax.tree.map(jnp.sum, tx.update(gradients, state, params, value=loss)[0])

    def trace(mean):
        wrapped = jax.shard_map(
            functools.partial(step, mean),
            mesh=mesh,
            in_specs=(P(), P(), P(), P("data")),
            out_specs=P(),
            check_vma=True,
        )
        jax.eval_shape(wrapped, params, state, params, jax.ShapeDtypeStruct((2,), jnp.float32))

    trace(mean=True)
    with pytest.raises(ValueError, match=r"value: the loss differs .*pmean"):
        trace(mean=False)


# -- inject_hyperparams -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_epsilon_of_adam_survives_the_dtype_of_the_params(dtype):
    """`inject_hyperparams` rounds 1e-8 to the params' dtype, in which it may be zero."""
    tx = optax.inject_hyperparams(OPTIMIZERS["celo2"].constructor)(
        weights=optimizers.weights("celo2"), learning_rate=0.5
    )
    params = {"b": jnp.ones((3,), dtype)}
    gradients = {"b": jnp.asarray([0.0, 1.0, -1.0], dtype)}
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(np.float32(updates["b"]), [0.0, -0.5, 0.5], rtol=1e-2)


# -- what the docs say --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "accumulation", "updates"),
    [(20, None, 20), (20, 2, 10), (1, 2, 1), (300_001, None, 100_000), (300_001, 1, 300_001)],
)
@pytest.mark.filterwarnings("ignore:VeLO was meta-trained")
def test_what_num_steps_counts(num_steps, accumulation, updates, monkeypatch):
    """Calls: of the rule's own updates there are as many less as it accumulates."""
    seen = []
    controlled = velo_module.controlled
    monkeypatch.setattr(
        velo_module,
        "controlled",
        lambda name, steps, *args, **kwargs: (
            seen.append(steps) or controlled(name, steps, *args, **kwargs)
        ),
    )
    optimizers.make("velo", num_steps=num_steps, gradient_accumulation=accumulation)
    assert seen == [updates]


def test_celo2_moves_matrices_without_gradient_and_adamw_does_not():
    params = {"learned": jnp.ones((3, 4)), "adamw": jnp.ones((3, 4))}
    tx = optimizers.make("celo2_base", learning_rate=0.01, label_fn=lambda path, leaf: path[0].key)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(np.sqrt(np.mean(updates["learned"] ** 2)), 0.01, rtol=1e-3)
    np.testing.assert_array_equal(updates["adamw"], 0.0)
