"""Functions of a tensor that are evaluated block by block, against the whole at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt_jax
from lopt_jax.xla.blocks import map_and_sum_blocks, map_blocks, replace_blocks


def function(x, row, columns):
    return jnp.square(x) + row * columns[0] - columns[1]


@pytest.mark.parametrize("elements", [7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("shape", [(31,), (64, 12), (37, 8), (5, 46, 6), (3, 700)])
def test_blocks_are_the_whole(shape, elements):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.integers(-9, 9, s), jnp.float32)  # noqa: E731
    ones = (1,) * (len(shape) - 1)
    arguments = (draw(*shape), draw(*shape[:-1], 1), draw(2, *ones, shape[-1]))
    got = jax.jit(lambda *xs: map_blocks(function, xs, shape, elements))(*arguments)
    np.testing.assert_array_equal(got, function(*arguments))


@pytest.mark.parametrize("elements", [7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("shape", [(31,), (64, 12), (37, 8), (5, 46, 6)])
def test_sums_over_blocks_are_those_of_the_whole(shape, elements):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-9, 9, shape), jnp.float32)

    def with_sums(x):
        return jnp.square(x), {"sum": jnp.sum(x), "two": jnp.stack([jnp.sum(x > 0), x.size])}

    got, sums = jax.jit(lambda x: map_and_sum_blocks(with_sums, (x,), shape, elements))(x)
    np.testing.assert_array_equal(got, np.square(x))
    assert float(sums["sum"]) == np.sum(x)
    assert sums["two"].tolist() == [np.sum(np.asarray(x) > 0), x.size]


@pytest.mark.parametrize("elements", [7, 64, 1000, 1 << 20])
@pytest.mark.parametrize("shape", [(31,), (64, 12), (37, 8), (5, 46, 6), (3, 700)])
def test_blocks_replace_the_whole(shape, elements):
    """The new state and the result, from the old state and arrays that are only read."""
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.integers(-9, 9, s), jnp.float32)  # noqa: E731
    ones = (1,) * (len(shape) - 1)
    state = {"first": draw(*shape), "second": draw(*shape).astype(jnp.bfloat16)}
    read = (draw(*shape), draw(*shape[:-1], 1), draw(2, *ones, shape[-1]))

    def replaced(state, read):
        made = function(*read) + state["first"]
        return {"first": made, "second": -state["second"]}, 2 * made

    run = jax.jit(lambda state, read: replace_blocks(replaced, state, read, shape, elements))
    jax.tree.map(np.testing.assert_array_equal, run(state, read), replaced(state, read))


def test_blocks_are_replaced_in_place():
    shape = (1024, 64)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(state, read):
        add = lambda state, read: (jnp.sin(state) + read, jnp.cos(read))  # noqa: E731
        return replace_blocks(add, state, read, shape, 64 * 64)

    compiled = jax.jit(run, donate_argnums=0).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 1024 * 64


@pytest.mark.parametrize("rows", [1024, 1009])  # 1009 is prime
def test_arguments_are_not_copied(rows):
    shape = (rows, 64)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(*xs):
        add = lambda *xs: sum(map(jnp.sin, xs))  # noqa: E731
        return map_blocks(add, xs, shape, 64 * 64)

    compiled = jax.jit(run).lower(*[x] * 6).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2.2 * 4 * rows * 64


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_wide_networks_are_written_out_only_where_weights_are_constants(monkeypatch):
    """Numbers that a program is given take a written out network six times as long (XLA's CPU)."""
    weights = lopt_jax.load_weights("small_fc_lopt")
    params = {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    state = jax.eval_shape(lopt_jax.small_fc_lopt().init, params)

    def update(weights, gradients, state, params):
        return lopt_jax.small_fc_lopt(weights).update(gradients, state, params)

    of_program = functools.partial(update, weights)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert products(of_program, params, state, params) == 1  # that of the time features
    assert products(update, weights, params, state, params) > 1
