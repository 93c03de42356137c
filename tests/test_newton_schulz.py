"""Newton-Schulz: singular values against numpy in float64, batches, forms, and edge cases."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest

from lopt_jax.rules import newton_schulz as module
from lopt_jax.rules.newton_schulz import QUINTIC, gram_blocks, newton_schulz, polar_express

SPECTRA = {"flat": (1.0, 1.0), "falling": (1.0, 3e-2), "steep": (1.0, 1e-3)}


def matrix(shape, spectrum, seed=0):
    """Singular vectors and values, float64, of a random matrix of Frobenius norm one."""
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    values = np.geomspace(*SPECTRA[spectrum], min(shape))
    return u, values / np.linalg.norm(values), v


def after(values, coefficients):
    """What the polynomials make of singular values, in float64."""
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def relative_error(got, expected):
    return np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("form", ["matrix", "gram"])
@pytest.mark.parametrize("spectrum", ["flat", "steep"])
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (40, 40)])
def test_singular_values_in_float32(shape, spectrum, form):
    u, values, v = matrix(shape, spectrum)
    x = jnp.float32((u * values) @ v)
    for coefficients in (QUINTIC, QUINTIC[:2], polar_express(6)):
        expected = (u * after(values, coefficients)) @ v
        got = newton_schulz(7 * x, coefficients=coefficients, form=form)
        assert relative_error(got, expected) < 3e-5


@pytest.mark.parametrize("spectrum", ["flat", "falling"])
@pytest.mark.parametrize("shape", [(24, 96), (40, 40)])
def test_singular_values_in_bfloat16(shape, spectrum):
    """Within a few roundings, on the Gram matrix too."""
    u, values, v = matrix(shape, spectrum)
    x = jnp.float32((u * values) @ v)
    for coefficients in (QUINTIC, polar_express(5, safety=1.05)):
        expected = (u * after(values, coefficients)) @ v
        for form in ("matrix", "auto"):
            got = newton_schulz(x, coefficients=coefficients, precision="bfloat16", form=form)
            assert got.dtype == jnp.float32
            direction, unit = got / np.linalg.norm(got), expected / np.linalg.norm(expected)
            assert 1e-4 < relative_error(direction, unit) < 0.06
            singular_values = np.linalg.svd(np.float64(got), compute_uv=False)
            np.testing.assert_allclose(
                singular_values, np.sort(after(values, coefficients))[::-1], rtol=0, atol=0.15
            )


def test_polynomials_end_near_one():
    """Muon's between 0.68 and 1.13, or 1.21; the better ones nearer with every one of them."""
    values = np.geomspace(1e-2, 1, 1000)
    worst = lambda coefficients: np.abs(after(values, coefficients) - 1).max()  # noqa: E731
    assert 0.31 < worst(QUINTIC) < 0.32
    assert 0.12 < worst(polar_express(5)) < 0.13
    assert worst(polar_express(6)) < 3e-3
    assert worst(polar_express(7)) < 1e-5
    assert worst(polar_express(12)) < 1e-14
    assert len(polar_express(12)) == 12


def test_a_batch_is_its_matrices():
    shape = (2, 3, 5, 8)
    x = np.asarray(optimizers.random_like(np.zeros(shape, np.float32), 0))
    x = x * np.logspace(0, 6, 6, dtype=np.float32).reshape((2, 3, 1, 1))  # norms of their own
    for precision, atol in (("highest", 1e-5), ("bfloat16", 6e-2)):
        run = jax.jit(functools.partial(newton_schulz, precision=precision))
        together, transposed = run(x), run(np.swapaxes(x, -2, -1))
        one_by_one = np.reshape([run(y) for y in np.reshape(x, (6, 5, 8))], shape)
        np.testing.assert_allclose(together, one_by_one, rtol=0, atol=atol)
        np.testing.assert_allclose(np.swapaxes(transposed, -2, -1), together, rtol=0, atol=atol)


@pytest.mark.parametrize(("precision", "rtol"), [("highest", 1e-5), ("bfloat16", 4e-2)])
def test_edge_cases(precision, rtol):
    run = jax.jit(functools.partial(newton_schulz, precision=precision, form="gram"))
    assert run(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert run(np.zeros((4, 0, 3), np.float32)).shape == (4, 0, 3)
    one = after(np.float64(1), QUINTIC)
    np.testing.assert_allclose(run(np.float32([[-3]])), -one, rtol=rtol)
    row = np.arange(1, 6, dtype=np.float32)[None]
    zeros, nan, small, unit = run(np.stack([0 * row, np.nan * row, 1e-3 * row, row]))
    np.testing.assert_array_equal(zeros, 0)
    assert np.isnan(nan).all()
    expected = one * np.arange(1, 6)[None] / np.sqrt(55)
    for rows in (small, unit, run(row.T).T):
        np.testing.assert_allclose(rows, expected, rtol=rtol)


def test_gram_matrices_where_they_are_fewer_operations():
    """Counted by hand for m x n: 10 m² n + 5 m³ on matrices, 6 m² n + 11 m³ on Gram matrices."""
    assert gram_blocks(8, 12, 5) == (1, 1, 1, 1, 1)
    assert gram_blocks(8, 13, 5) == (2, 2, 1)
    assert gram_blocks(8, 32, 6) == (2, 2, 2)
    assert module.operations(8, 32, (1,) * 5) == 10 * 8 * 8 * 32 + 5 * 8**3
    assert module.operations(8, 32, (2, 2, 1)) == 6 * 8 * 8 * 32 + 11 * 8**3
    products = str(jax.make_jaxpr(functools.partial(newton_schulz, form="gram"))(jnp.ones((8, 32))))
    assert products.count("dot_general") == 6 + 11


@pytest.mark.parametrize(
    ("platform", "dtypes"), [("cpu", {"float32"}), ("tpu", {"bfloat16"}), ("gpu", {"bfloat16"})]
)
def test_auto_is_bfloat16_where_there_are_matrix_units(platform, dtypes, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    run = functools.partial(newton_schulz, precision="auto")
    equations = jax.make_jaxpr(run)(jnp.ones((8, 32))).eqns
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert {str(x.aval.dtype) for e in products for x in e.invars} == dtypes
    if platform == "cpu":
        assert {e.params["precision"][0] for e in products} == {jax.lax.Precision.HIGHEST}


def test_old_gpus_have_no_matrix_units_for_it():
    for capability, expected in (
        ("7.5", "highest"),
        ("8.0", "bfloat16"),
        ("12.0", "bfloat16"),
        ("gfx942", "bfloat16"),
    ):
        gpu = SimpleNamespace(
            platform="gpu", runs_on=SimpleNamespace(compute_capability=capability)
        )
        assert module.precision_on(gpu, "auto") == expected


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"form: expected .*'gramm'"):
        newton_schulz(jnp.ones((2, 2)), form="gramm")
    with pytest.raises(ValueError, match=r"precision: expected one of 'auto', .*'exact'"):
        newton_schulz(jnp.ones((2, 2)), precision="exact")
    with pytest.raises(ValueError, match=r"precision: .*'exact'"):
        optimizers.make("celo2", precision="exact")


# -- in an optimizer ------------------------------------------------------------------------------


def orthogonalised_shapes(params, monkeypatch, **options):
    """Shapes of the batches that celo2 makes of the matrices of these params."""
    seen = []
    whole = module.newton_schulz
    spy = lambda x, **kwargs: seen.append(x.shape) or whole(x, **kwargs)  # noqa: E731
    monkeypatch.setattr("lopt_jax.optimizers.orthogonal.newton_schulz", spy)
    tx = optimizers.make("celo2", **options)
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    return sorted(seen)


def test_matrices_of_one_shape_are_one_batch(monkeypatch):
    """Of leaves, of stacks, of batch axes, and of kernels of attention."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    shapes = {
        "a": (6, 8),
        "b": (6, 8),
        "stack": (3, 6, 8),
        "experts": (2, 2, 6, 8),
        "query": {"kernel": (6, 2, 4)},
        "tall": (8, 6),
        "vector": (8,),
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert orthogonalised_shapes(params, monkeypatch) == [(8, 6), (10, 6, 8)]
    monkeypatch.setattr("lopt_jax.optimizers.orthogonal._BATCH_ELEMENTS", 4 * 48)
    # a and b; the experts; the kernel and the stack
    expected = [(2, 2, 6, 8), (2, 6, 8), (4, 6, 8), (8, 6)]
    assert orthogonalised_shapes(params, monkeypatch) == expected


def test_batched_updates_are_those_of_leaves_alone(monkeypatch):
    params = optimizers.random_like({"a": jnp.zeros((4, 6)), "b": jnp.zeros((2, 4, 6))}, 0)
    gradients = optimizers.random_like(params, 1)
    updates = []
    for together in (True, False):
        limit = 1 << 20 if together else 0
        monkeypatch.setattr("lopt_jax.optimizers.orthogonal._BATCH_ELEMENTS", limit)
        tx = optimizers.make("celo2", learning_rate=1.0)
        updates.append(tx.update(gradients, tx.init(params), params)[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), *updates)
