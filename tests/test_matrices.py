"""The optimizer of matrices: where the matrices of a leaf are, and what its plan says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
import reference
from flax import nnx

from lopt_jax.optimizers import common, plans
from lopt_jax.optimizers.adam import AdamSettings
from lopt_jax.optimizers.matrices import ARCHITECTURES, AdamW, matrix_optimizer, plans_of
from lopt_jax.optimizers.plans import ADAMW, LEARNED, LeafPlan, Matrix, celo2_plans
from lopt_jax.weights import resolve

LAST_TWO = ((-2,), (-1,))
TO_HEADS = ((-3,), (-2, -1))  # (features, heads, head size)
FROM_HEADS = ((-3, -2), (-1,))  # (heads, head size, features), and windows of one dimension
CONVOLUTION = ((-4, -3, -2), (-1,))


def matrices_by_name(params, stacked_axes=None):
    """For each kernel of rank three and more, by its path: the axes of rows and columns."""
    found = plans_of(celo2_plans(None, None), params, stacked_axes)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        ".".join(plans.names_of(path)): tuple(plan.matrix)
        for (path, leaf), plan in zip(leaves, found, strict=True)
        if leaf.ndim > 2 and plans.names_of(path)[-1] != "bias"
    }


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (3, 3))(images)
        x = nn.ConvTranspose(12, (2, 2), name="upconv")(x).reshape((1, -1, 12))
        x = nn.Conv(12, (4,))(x)
        x = nn.MultiHeadDotProductAttention(3)(x)
        partitioned = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model", None))
        heads = nn.DenseGeneral((2, 3), kernel_init=partitioned)(x)
        x = nn.DenseGeneral(12, axis=(-2, -1), name="out")(heads)
        return nn.DenseGeneral((3, 2, 4), name="qkv")(x)


def test_layers_of_linen_are_recognised():
    params = jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    attention = "MultiHeadDotProductAttention_0"
    assert matrices_by_name(params) == {
        "Conv_0.kernel": CONVOLUTION,
        "upconv.kernel": CONVOLUTION,
        "Conv_1.kernel": FROM_HEADS,
        f"{attention}.query.kernel": TO_HEADS,
        f"{attention}.key.kernel": TO_HEADS,
        f"{attention}.value.kernel": TO_HEADS,
        f"{attention}.out.kernel": FROM_HEADS,
        "DenseGeneral_0.kernel": TO_HEADS,
        "out.kernel": FROM_HEADS,
        "qkv.kernel": ((-4,), (-3, -2, -1)),
    }


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (4, 4), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 8, 8, decode=False, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
        self.embed = nnx.Embed(5, 8, rngs=rngs)


def test_layers_of_nnx_are_recognised():
    params = nnx.eval_shape(lambda: nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param))
    assert matrices_by_name(params) == {
        "stem.kernel": CONVOLUTION,
        "conv.kernel": FROM_HEADS,
        "attention.query.kernel": TO_HEADS,
        "attention.key.kernel": TO_HEADS,
        "attention.value.kernel": TO_HEADS,
        "attention.out.kernel": FROM_HEADS,
        "heads.kernel": TO_HEADS,
    }


def test_what_may_be_a_stack_has_its_matrices_in_the_last_two_axes():
    """A scanned model, experts, and names that are not Flax's, such as those of the fixtures."""
    kernel = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}  # noqa: E731
    params = {
        "scanned": {
            "up": kernel(12, 64, 256),
            "query": kernel(12, 64, 4, 16),
            "wo": kernel(4, 9, 8),
        }
    }
    expected = {"scanned.up.kernel": LAST_TWO, "scanned.wo.kernel": LAST_TWO}
    assert matrices_by_name(params) == expected | {"scanned.query.kernel": TO_HEADS}
    stacked = {"mlp": kernel(12, 64, 256), "Conv_0": kernel(12, 3, 3, 8, 8)}
    assert matrices_by_name(stacked, 1) == {"mlp.kernel": LAST_TWO, "Conv_0.kernel": CONVOLUTION}
    recorded = matrices_by_name(reference.trajectory("celo2").init)
    assert recorded == dict.fromkeys(("conv", "mid", "qkv", "tie"), LAST_TWO)


def test_plans_say_why():
    leaf = jnp.ones((2, 2))
    params = {"adamw": leaf, "learned": {"b": leaf[0], "query": {"kernel": leaf[None]}}}
    tx = optimizers.make("celo2", label_fn=lambda path, _: plans.names_of(path)[0])
    assert tx.plans(params) == [
        LeafPlan(ADAMW, reason="label_fn says so"),
        LeafPlan(ADAMW, reason="of rank 1"),
        LeafPlan(LEARNED, Matrix(*TO_HEADS), reason="a kernel of attention: features by heads"),
    ]


def test_whole_kernels_are_orthogonalised():
    """The singular values of the matrix that a layer multiplies by are near one another."""
    shapes = {"query": (8, 4, 3), "out": (4, 3, 8), "conv": (3, 3, 2, 6)}
    params = {k: {"kernel": jnp.zeros(shape)} for k, shape in shapes.items()}
    gradients = optimizers.random_like(params, 0)
    tx = optimizers.make("celo2", learning_rate=1.0)
    updates, _ = tx.update(gradients, tx.init(params), params)
    for name, shape in {"query": (8, 12), "out": (12, 8), "conv": (18, 6)}.items():
        matrix = np.float64(updates[name]["kernel"]).reshape(shape)
        np.testing.assert_allclose(np.sqrt(np.mean(matrix**2)), 1, rtol=1e-5)
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / values.min() < 2  # of slices that are orthogonalised apart: 2.6 to 8


def test_an_axis_of_size_one_changes_nothing():
    """A single head: the matrix is that of a leaf of rank two; features are normalised alike."""
    flat = optimizers.random_like({"b": jnp.zeros(2), "w": jnp.zeros((8, 6))}, 1)
    single = {"b": flat["b"], "query": {"kernel": flat["w"].reshape((8, 1, 6))}}
    gradients = optimizers.random_like(flat, 2)
    of_single = {"b": gradients["b"], "query": {"kernel": gradients["w"].reshape((8, 1, 6))}}
    tx = optimizers.plain("celo2")
    expected, _ = tx.update(gradients, tx.init(flat), flat)
    got, _ = tx.update(of_single, tx.init(single), single)
    got = got["query"]["kernel"].reshape((8, 6))
    np.testing.assert_allclose(got, expected["w"], rtol=1e-5, atol=1e-7)


def test_batch_axes_anywhere_hold_separate_matrices():
    """As leaves of their own, also where a leaf has its axes in another order, as Muon says it."""
    apart = optimizers.random_like({f"w{i}": jnp.zeros((6, 5)) for i in range(2)}, 0)
    gradients = optimizers.random_like(apart, 1)
    joined, of_joined = (jnp.stack(list(x.values()), axis=1) for x in (apart, gradients))
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=0)
    tx = optimizers.make("celo2", matrix_axes=lambda path, leaf: numbers)
    got, _ = tx.update(of_joined, tx.init(joined), joined)
    plain = optimizers.plain("celo2")
    expected, _ = plain.update(gradients, plain.init(apart), apart)
    for i, leaf in enumerate(expected.values()):
        np.testing.assert_allclose(got[:, i], leaf, rtol=1e-4, atol=1e-7)


def test_last_two_axes_are_the_original():
    """Whatever the leaves' names, where it is asked for."""
    params = {"query": {"kernel": jnp.zeros((4, 3, 2))}, "conv": {"kernel": jnp.zeros((3, 3, 2))}}
    tx = optimizers.make("celo2", matrix_axes="last_two")
    assert {plan.matrix for plan in tx.plans(params)} == {Matrix(*LAST_TWO)}


@pytest.mark.parametrize(
    ("matrix_axes", "error", "says"),
    [
        (lambda path, leaf: 3, TypeError, r"such as \(\(0,\), \(1, 2\)\); found 3"),
        (lambda path, leaf: ((0,), (3,)), ValueError, r"different axes of the leaf \['w'\]"),
        (lambda path, leaf: ((0,), (-3,)), ValueError, "different axes"),
        (lambda path, leaf: ((0, 1), ()), ValueError, "for rows and columns"),
        ("first_two", TypeError, "'last_two' or None; found 'first_two'"),
    ],
)
def test_wrong_axes_are_named(matrix_axes, error, says):
    with pytest.raises(error, match=f"matrix_axes: .*{says}"):
        optimizers.make("celo2", matrix_axes=matrix_axes).init({"w": jnp.ones((2, 3, 4))})


def test_stacked_axes_are_in_no_matrix():
    tx = optimizers.make("celo2", stacked_axes=1, matrix_axes=lambda path, leaf: (0, 1))
    with pytest.raises(ValueError, match=r"leaf \['w'\] has 1 stacked axes"):
        tx.init({"w": jnp.ones((2, 3, 4))})


def test_leaves_without_gradient_may_be_anything():
    params = {"b": jnp.ones(3), "key": jax.random.key(0), "w": jnp.ones((3, 4))}
    tx = optimizers.plain("celo2")
    gradients = {"b": None, "key": None, "w": jnp.eye(3, 4)}
    updates, state = tx.update(gradients, tx.init(params), params)
    assert updates["b"] is updates["key"] is None
    assert updates["w"].shape == (3, 4)
    assert state.accumulators.momentum[0]["b"].shape == (3,)


# -- plans of others than Celo2 -------------------------------------------------------------------


def planned(of_leaves, options=None, **arguments):
    """An optimizer of these plans, with the weights of the tests."""
    weights = resolve(optimizers.weights("celo2"), ARCHITECTURES)
    adamw = AdamW(1.0, 0.0, AdamSettings((0.9, 0.95), 1e-8))
    return matrix_optimizer(
        weights,
        options or common.Options(learning_rate=1.0),
        adamw,
        plans=lambda params, stacked: of_leaves,
        max_gradient_norm=None,
        orthogonal=True,
        **arguments,
    )


def test_scale_and_decay_of_leaves():
    """A decay that belongs to the horizon: a schedule that the learning rate does not multiply."""
    params = {"b": jnp.full((3,), 2.0), "v": jnp.full((2, 3), 4.0), "w": jnp.full((4, 3), 8.0)}
    gradients = optimizers.random_like(params, 0)
    of_leaves = [
        LeafPlan(ADAMW, scale=3.0, decay=0.0),
        LeafPlan(ADAMW, scale=0.5),
        LeafPlan(LEARNED, scale=2.0, decay=0.25),
    ]
    plain = planned([plan._replace(scale=1.0, decay=1.0) for plan in of_leaves])
    step, _ = plain.update(gradients, plain.init(params), params)
    tx = planned(
        of_leaves, common.Options(learning_rate=0.1), decay=lambda count: 0.5 / (1.0 + count)
    )
    state = tx.init(params)
    updates, state = tx.update(gradients, state, params)
    np.testing.assert_allclose(updates["b"], 0.3 * step["b"], rtol=1e-6)
    np.testing.assert_allclose(updates["v"], 0.05 * step["v"] - 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates["w"], 0.2 * step["w"] - 1.0, rtol=1e-6)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    adam = optax.adam(1.0, b2=0.95)
    _, adam_state = adam.update(gradients, adam.init(params))
    expected, _ = adam.update(jax.tree.map(jnp.zeros_like, params), adam_state)
    np.testing.assert_allclose(updates["v"], 0.05 * expected["v"] - 1.0, rtol=1e-5)


def test_the_mask_holds_for_decay_of_its_own():
    params = {"v": jnp.full((2, 3), 4.0), "w": jnp.full((4, 3), 8.0)}
    options = common.Options(learning_rate=0.0, weight_decay_mask={"v": False, "w": True})
    tx = planned([LeafPlan(ADAMW)] * 2, options, decay=0.5)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["v"], 0)
    np.testing.assert_array_equal(updates["w"], -4)


def test_matrices_without_gradient_stay():
    """Decay aside. Every matrix of a leaf is one of its own: of idle experts, none moves."""
    params = optimizers.random_like({"expert": jnp.zeros((3, 4, 5)), "w": jnp.zeros((4, 5))}, 0)
    gradients = {"expert": params["expert"].at[1].set(0), "w": jnp.zeros((4, 5))}
    tx = planned([LeafPlan(LEARNED)] * 2, decay=0.5, still_where_zero=True)
    for scale in (1.0, 1e-30):  # the square of which is zero
        of_scale = jax.tree.map(lambda g, scale=scale: scale * g, gradients)
        updates, _ = tx.update(of_scale, tx.init(params), params)
        steps = jax.tree.map(lambda u, p: np.asarray(u + 0.5 * p), updates, params)
        np.testing.assert_array_equal(steps["w"], 0)
        np.testing.assert_array_equal(steps["expert"][1], 0)
        moved = np.sqrt(np.mean(steps["expert"][[0, 2]] ** 2, axis=(1, 2)))
        np.testing.assert_allclose(moved, 1, rtol=1e-5)
