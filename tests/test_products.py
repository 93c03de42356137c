"""Products by way of complex numbers, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt_jax.compiler import products


@pytest.mark.parametrize("inner", [1, 2, 30, 257, 512])
def test_complex_products_are_as_exact_as_real_ones(inner):
    rng = np.random.default_rng(inner)
    x, weight = rng.normal(size=(37, inner)), rng.normal(size=(inner, 19))
    x, weight = (np.asarray(a, np.float32) for a in (x, weight))
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(weight)  # of what is added up
    got = jax.jit(products._complex)(x, weight)
    assert got.dtype == jnp.float32
    assert np.all(np.abs(got - exact) <= 4 * np.finfo(np.float32).eps * size)


def test_a_gpu_gets_a_complex_product_where_it_is_large_enough(monkeypatch):
    x, weight = jnp.ones((64, 32)), jnp.ones((32, 16))

    def text(platform, quickly=True):
        traced = jax.jit(lambda *xs: products.product(*xs, quickly)).trace(x, weight)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "complex" not in text("cuda")
    monkeypatch.setattr(products, "WORTH_IT", 64 * 32 * 16)
    assert "dot_general" in text("cuda")
    assert "complex" in text("cuda")
    assert "complex" not in text("cuda", quickly=False)
    assert "complex" not in text("cpu")


def test_memory_for_it_is_at_most_twice_the_largest_leaf():
    assert products.may_work(16 << 20)
    assert not products.may_work((16 << 20) - 1)


def test_both_forms_have_the_same_derivatives(monkeypatch):
    rng = np.random.default_rng(0)
    x, weight, by = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6), (6, 5), (8, 5)))
    gradients = jax.grad(lambda f, *xs: jnp.sum(f(*xs) * by), argnums=(1, 2))
    for got, expected in zip(
        gradients(jax.tree_util.Partial(products._complex), x, weight),
        gradients(jax.tree_util.Partial(products._real), x, weight),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, 1e-5, 1e-6)
    batched = jax.vmap(products._complex)(jnp.stack([x, 2 * x]), jnp.stack([weight, weight]))
    np.testing.assert_allclose(batched[1], 2 * x @ weight, 1e-5, 1e-5)
