"""What users are handed: an optimizer's functions, its repr, and the leaves that it passes over."""

import functools
import inspect
import os
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest

import lopt_jax
from lopt_jax.flax import OVERWRITE_WITH_GRADIENT, TrainState

LOSS = jnp.float32(1.5)
OTHERS = {
    "clipped": functools.partial(optimizers.make, "elo", max_gradient_norm=1.0),
    "accumulating": functools.partial(optimizers.make, "velo", gradient_accumulation=2),
    "lopt": lambda: lopt_jax.lopt(20, optimizers.weights("celo2")),
    "packed": lambda: lopt_jax.packed(optimizers.plain("velo")),
    "arrays": functools.partial(
        optimizers.make,
        "celo2",
        learning_rate=jnp.float32(0.1),
        stacked_axes=lambda path, leaf: 0,
        weight_decay_mask=lambda params: jax.tree.map(lambda _: np.bool_(True), params),
    ),
}


def make(name):
    return OTHERS[name]() if name in OTHERS else optimizers.plain(name)


every_transformation = pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, *OTHERS])


# -- functions ----------------------------------------------------------------------------------


@every_transformation
def test_functions_are_what_optax_says_they_are(name):
    """Also to those who read signatures and sources."""
    tx = make(name)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    expected = inspect.signature(optax.with_extra_args_support(optax.adam(1.0)).update).parameters
    parameters = inspect.signature(update).parameters
    assert list(parameters)[:3] == list(expected)[:3] == ["updates", "state", "params"]
    assert parameters["params"].default is None
    kinds = [x.kind for x in parameters.values()]
    assert kinds[-1] is inspect.Parameter.VAR_KEYWORD
    assert set(kinds[3:-1]) <= {inspect.Parameter.KEYWORD_ONLY}
    assert list(inspect.signature(init).parameters) == ["params"]
    for function in tx:
        assert "def " in inspect.getsource(function)


def contents(x):
    """What optimistix finds when it opens the closures of a transformation: leaves of a tree."""
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, types.FunctionType):
            inspect.getsource(leaf)
            yield from contents([cell.cell_contents for cell in leaf.__closure__ or ()])
        else:
            yield leaf


@every_transformation
def test_closures_hold_arrays_and_what_can_be_hashed(name):
    """So a transformation can be a static argument, or a pytree (`optimistix.OptaxMinimiser`)."""
    for leaf in contents(make(name)):
        if not isinstance(leaf, jax.Array | np.ndarray):
            hash(leaf)


# -- repr ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_repr_says_which_optimizer_it_is(name):
    case = optimizers.OPTIMIZERS[name]
    text = repr(optimizers.make(name, weight_decay=0.25))
    assert text.startswith(case.constructor.__name__ + "(")
    assert f"weights=Weights({case.architecture!r}" in text
    assert "weight_decay=0.25" in text
    plain = {k: v for k, v in case.arguments.items() if not callable(v)}
    assert all(f"{key}={value!r}" in text for key, value in plain.items())


def test_repr_of_settings():
    def warmup(count):
        return count

    tx = lopt_jax.small_fc_lopt(
        learning_rate=warmup, weight_decay=jnp.float32(0.5), stacked_axes={"w": 1}
    )
    expected = (
        "small_fc_lopt(weights='small_fc_lopt', learning_rate="
        "test_repr_of_settings.<locals>.warmup, weight_decay=0.5, stacked_axes={'w': 1})"
    )
    assert repr(tx) == expected
    assert repr(lopt_jax.packed(tx)) == f"packed(tx={expected})"
    assert "small_fc_lopt" not in repr(tx._replace(init=len)).split("init=")[0]
    traced = jax.eval_shape(
        lambda x: len(repr(lopt_jax.small_fc_lopt(weight_decay=x))) * x, jnp.ones(())
    )
    assert traced.shape == ()


def test_constructors_keep_their_signatures():
    parameters = inspect.signature(lopt_jax.velo).parameters
    assert list(parameters)[:2] == ["num_steps", "weights"]
    assert "Metz" in lopt_jax.velo.__doc__


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_a_path_of_weights_type_checks(name):
    constructor = optimizers.OPTIMIZERS[name].constructor
    taken = typing.get_args(typing.get_type_hints(constructor)["weights"])
    assert {str, os.PathLike[str], lopt_jax.Weights} <= set(taken)


# -- leaves without a gradient --------------------------------------------------------------------


@functools.cache
def trees():
    """Parameters, gradients, and the names of the parameters that have none."""
    params = optimizers.random_like({"w": jnp.ones((3, 4)), "b": jnp.ones((4,))}, 0)
    gradients = optimizers.random_like(params, 1)
    without = {
        "frozen": (jnp.ones((4, 2)), None),
        "key": (jax.random.key(0), None),
        "keys": (jax.random.split(jax.random.key(1), 3), None),
        "count": (jnp.arange(3), np.zeros((3,), jax.dtypes.float0)),
    }
    params |= {name: leaf for name, (leaf, _) in without.items()}
    return params, gradients | {name: g for name, (_, g) in without.items()}, list(without)


def by_update(tx, params, state, gradients):
    updates, state = tx.update(gradients, state, params, value=LOSS)
    assert all(updates[name] is None for name in trees()[2])
    assert updates["w"].shape == params["w"].shape
    return lopt_jax.applying._add(params, updates), state


def by_update_params(tx, params, state, gradients):
    return lopt_jax.update_params(tx, gradients, state, params, value=LOSS)


def by_train_state(tx, params, state, gradients):
    train_state = TrainState(step=0, apply_fn=None, params=params, tx=tx, opt_state=state)
    train_state = train_state.apply_gradients(grads=gradients, value=LOSS)
    return train_state.params, train_state.opt_state


def by_train_state_with_scales(tx, params, state, gradients):
    params, gradients = (
        {"params": tree, OVERWRITE_WITH_GRADIENT: scale}
        for tree, scale in ((params, jnp.ones(())), (gradients, jnp.full((), 2.0)))
    )
    params, state = by_train_state(tx, params, state, gradients)
    assert float(params[OVERWRITE_WITH_GRADIENT]) == 2
    return params["params"], state


@pytest.mark.parametrize("step", [by_update, by_update_params, by_train_state])
@every_transformation
def test_what_has_no_gradient_is_passed_over(name, step):
    """Frozen leaves, PRNG keys, integers: the same leaves of all optimizers, whatever the way."""
    tx = make(name)
    params, gradients, without = trees()
    state = jax.eval_shape(tx.init, params)
    new, after = jax.eval_shape(functools.partial(step, tx), params, state, gradients)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params, new)
    assert all(same.values())
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(without) < set(new)


@pytest.mark.parametrize("step", [by_update_params, by_train_state, by_train_state_with_scales])
@pytest.mark.parametrize("name", ["celo2", "small_fc_lopt", "packed"])
def test_what_has_no_gradient_keeps_its_value(name, step):
    tx = make(name)
    params, gradients, without = trees()
    new, _ = step(tx, params, tx.init(params), gradients)
    for key in without:
        a, b = new[key], params[key]
        is_key = jnp.issubdtype(b.dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(*(map(jax.random.key_data, (a, b)) if is_key else (a, b)))
    for key in ("w", "b"):
        assert not np.array_equal(new[key], params[key])


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "lopt", "packed"])
def test_a_key_with_a_gradient_is_named(name):
    params, tx = {"key": jax.random.key(0)}, make(name)
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(TypeError, match=r"updates: expected None for \['key'\]"):
        jax.eval_shape(functools.partial(tx.update, value=LOSS), params, state, params)
