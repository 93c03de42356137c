"""Functions of a tensor that are evaluated block by block, against the whole at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt_jax.blocks import map_blocks


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


@pytest.mark.parametrize("rows", [1024, 1009])  # 1009 is prime
def test_arguments_are_not_copied(rows):
    shape = (rows, 64)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(*xs):
        add = lambda *xs: sum(map(jnp.sin, xs))  # noqa: E731
        return map_blocks(add, xs, shape, 64 * 64)

    compiled = jax.jit(run).lower(*[x] * 6).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2.2 * 4 * rows * 64
