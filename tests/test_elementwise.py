"""What `distributed` admits beside the optimizer: programs of elementwise primitives."""

import jax
import jax.numpy as jnp
import optax
import pytest

from lopt_jax.elementwise import Kind, NotElementwiseError, kinds_of_outputs

SHARD = jax.ShapeDtypeStruct((4, 6), jnp.float32)
TABLE = jnp.arange(6.0)


def kinds_after(function, *arguments):
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree.leaves(arguments)
    return kinds_of_outputs(closed, [Kind.SHARD if x.ndim else Kind.UNIFORM for x in leaves])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.where(x > 0, x, jnp.zeros_like(x)) * 3 + jnp.sum(TABLE),
        lambda x: jax.nn.gelu(x) + jax.lax.fori_loop(0, 3, lambda _, y: y - (y * y - x) / 2, x),
        lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x))[1],
        lambda x: jax.lax.cond(jnp.sum(TABLE) > 0, lambda: x, lambda: -x),
        lambda x: jax.checkpoint(jnp.sin)(x).astype(jnp.bfloat16),
        lambda x: x * jax.random.uniform(jax.random.key(0)) ** 0,
    ],
)
def test_elementwise_programs_are_admitted(function):
    assert kinds_after(function, SHARD) == [Kind.SHARD]


@pytest.mark.parametrize(
    ("primitive", "function"),
    [
        ("slice", lambda x: jnp.roll(x, 1, axis=0)),
        ("rev", lambda x: x[::-1]),
        ("fft", lambda x: jnp.fft.fft(x).real),
        ("cumlogsumexp", lambda x: jax.lax.cumlogsumexp(x)),
        ("reduce_sum", lambda x: x / jnp.sum(x)),
        ("reduce_and", lambda x: jnp.where(jnp.all(jnp.isfinite(x)), x, 0)),
        ("sort", lambda x: jnp.sort(x)),
        ("reshape", lambda x: x.reshape(-1)),
        ("transpose", lambda x: x.T),
        ("dot_general", lambda x: x @ TABLE),
        ("gather", lambda x: x[jnp.array([2, 0, 1, 3])]),
        ("scan", lambda x: jax.lax.scan(lambda c, row: (c + row, row), TABLE, x)[1]),
        ("mul", lambda x: x * jnp.arange(6)),
        ("mul", lambda x: x * TABLE),
        ("add", lambda x: x + jax.random.normal(jax.random.key(0), x.shape)),
        ("reduce_max", lambda x: jax.lax.while_loop(lambda y: jnp.max(y) < 3, lambda y: y + 1, x)),
        ("reduce_sum", lambda x: jax.jit(lambda lopt_x: x - lopt_x)(jnp.sum(x))),
    ],
)
def test_the_rest_is_refused_by_the_primitives_name(primitive, function):
    with pytest.raises(NotElementwiseError) as error:
        kinds_after(function, SHARD)
    assert error.value.primitive.split()[0] == primitive


def test_a_function_is_not_trusted_for_how_its_name_begins():
    def lopt_mine(x):
        return x / jnp.sum(x)

    with pytest.raises(NotElementwiseError, match="reduce_sum"):
        kinds_after(jax.jit(lopt_mine), SHARD)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100)),
        lambda: optax.sgd(
            optax.piecewise_interpolate_schedule("cosine", 1.0, {10: 0.1, 20: 0.2}), momentum=0.9
        ),
        lambda: optax.MultiSteps(optax.radam(0.1), 2).gradient_transformation(),
        lambda: optax.inject_hyperparams(optax.lion)(0.1),
        lambda: optax.contrib.ademamix(0.1),
        lambda: optax.masked(optax.chain(optax.clip(1.0), optax.rprop(0.1)), {"a": True}),
        lambda: optax.keep_params_nonnegative(),
    ],
)
def test_transformations_of_optax_are_admitted(make):
    tx, params = make(), {"a": SHARD}
    kinds_after(tx.update, params, jax.eval_shape(tx.init, params), params)
