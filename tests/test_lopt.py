"""lopt: its arithmetic against numpy, what it leaves alone, and its arguments.

That it works in the wrappers of optax and Flax, sharded, restored, and with stacked axes, is in the
tests that run over all optimizers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest

import lopt_jax
from lopt_jax.features import velo_features
from lopt_jax.optimizers.lopt import adam_betas, schedule

RECIPE = lopt_jax.Recipe()
NUM_STEPS = 40


@functools.cache
def plain():
    return lopt_jax.lopt(NUM_STEPS)


@functools.cache
def params():
    """A matrix, an embedding, a head, a norm, a bias: of each role one leaf."""
    shapes = {
        "Embed_0": {"embedding": jnp.zeros((7, 4))},
        "Dense_0": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)},
        "LayerNorm_0": {"scale": jnp.zeros(6)},
        "head": {"kernel": jnp.zeros((6, 3))},
    }
    return optimizers.random_like(shapes, 0)


def gradients_at(step, like=None):
    return optimizers.random_like(params() if like is None else like, 100 + step, scale=0.1)


@jax.jit
def compiled(numbers, gradients, state, tree):
    """An update whose arguments are traced: one program for the tests of values."""
    return lopt_jax.lopt(**numbers).update(gradients, state, tree)


def update(gradients, state=None, tree=None, **numbers):
    """Updates and state; the first ones where no state is given."""
    tree = params() if tree is None else tree
    state = plain().init(tree) if state is None else state
    numbers = {"num_steps": NUM_STEPS, "learning_rate": 1.0, "weight_decay": 1.0, **numbers}
    return compiled(numbers, gradients, state, tree)


def trajectory(steps, gradients=gradients_at, **numbers):
    """Parameters after some steps."""
    tree, state = params(), plain().init(params())
    for step in range(steps):
        updates, state = update(gradients(step), state, tree, **numbers)
        tree = optax.apply_updates(tree, updates)
    return tree


def trajectory_of(tx, steps, gradients=gradients_at, tree=None):
    """The same of any transformation."""
    tree = params() if tree is None else tree
    state = tx.init(tree)
    step_of = jax.jit(tx.update)
    for step in range(steps):
        updates, state = step_of(gradients(step), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def assert_close(actual, expected, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), actual, expected)


# -- the schedule -------------------------------------------------------------------------------


def schedule_by_numpy(count, num_steps):
    """Up to one in a tenth of the steps, then down a line that is zero at the end; a floor."""
    warm = max(num_steps / 10, 1)
    line = np.interp(count, [warm, max(num_steps, warm + 1)], [num_steps - warm, 0])
    down = line / max(num_steps - warm, 1) if num_steps > warm else float(count < 1)
    return min((count + 1) / warm, max(down, 0.01))


@pytest.mark.parametrize("num_steps", [1, 2, 15, 400])
def test_schedule(num_steps):
    counts = np.arange(num_steps + 5)
    got = jax.vmap(lambda count: schedule(count, num_steps, RECIPE))(counts)
    expected = [schedule_by_numpy(count, num_steps) for count in counts]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(got[num_steps:], 0.01, rtol=1e-6)  # training past the end
    assert max(got) == 1
    traced = jax.jit(lambda n: jax.vmap(lambda count: schedule(count, n, RECIPE))(counts))
    np.testing.assert_allclose(traced(num_steps), got, rtol=1e-6)


# -- matrices -----------------------------------------------------------------------------------


def orthogonal(x):
    """Five quintic iterations of Newton-Schulz in float64."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def unit(x):
    return x / np.sqrt(np.mean(np.square(x)))


def clipped(gradients):
    """Gradients of global norm one at most, in float64."""
    leaves = jax.tree.map(np.float64, gradients)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(leaves)))
    return jax.tree.map(lambda g: g / max(norm, 1), leaves)


def growth(num_steps):
    return max(1000 / num_steps, 1) ** (1 / 3)


def shrinking(num_steps):
    return min(1000 / num_steps, 1) ** 0.25


def decay_at(step, num_steps):
    grown = 12 * max(num_steps / 1000, 1) ** 0.4
    return grown / max(num_steps, 600) * schedule_by_numpy(step, num_steps)


def matrix_by_numpy(p, gradients, num_steps):
    p, momentum = np.float64(p), 0
    for step, g in enumerate(gradients):
        momentum = 0.9 * momentum + 0.1 * g
        direction = unit(orthogonal(unit(g) + unit(momentum)))
        inputs, outputs = p.shape
        size = 0.038 / np.sqrt(min(p.shape)) * min(outputs / inputs, 1) ** 0.25
        size = size * shrinking(num_steps) * schedule_by_numpy(step, num_steps)
        decay = np.where(direction * p >= 0, decay_at(step, num_steps) * p, 0)
        p = p - size * direction - decay
    return p


def test_the_schedule_of_the_last_count():
    """Counts stay at the largest integer: the one after it would be negative."""
    last = jnp.int32(2**31 - 1)
    assert float(schedule(last, NUM_STEPS, RECIPE)) == pytest.approx(RECIPE.floor)


@pytest.mark.parametrize("num_steps", [NUM_STEPS, 5000])
@pytest.mark.parametrize("scale", [0.1, 10.0])  # the second is clipped
def test_matrices_by_numpy(num_steps, scale):
    steps = 4
    gradients = [jax.tree.map(lambda g: scale * g, gradients_at(i)) for i in range(steps)]
    got = trajectory(steps, gradients.__getitem__, num_steps=num_steps)
    of_matrix = [clipped(g)["Dense_0"]["kernel"] for g in gradients]
    start = params()["Dense_0"]["kernel"]
    expected = matrix_by_numpy(start, of_matrix, num_steps)
    moved = np.asarray(got["Dense_0"]["kernel"], np.float64) - start
    bound = 1e-4 * np.abs(moved).max() + steps * np.finfo(np.float32).eps  # of parameters near one
    np.testing.assert_allclose(moved, expected - start, rtol=0, atol=bound)


# -- where the gradient has died ------------------------------------------------------------------


def factor_by_numpy(squared_norms, num_steps):
    """The square of how far the recent gradients are below the threshold, at most one."""
    n = len(squared_norms)
    weights = 0.9 ** np.arange(n)[::-1]
    recent = np.sum(weights * squared_norms) / np.sum(weights)
    threshold = 0.3 * (1 - 1000 / max(num_steps, 1000))
    limit = threshold**2 * np.mean(squared_norms)
    return min(recent / limit, 1) if limit else 1.0


def sized_gradients(sizes):
    """Gradients of the first step at several sizes, none of which is clipped."""
    return [jax.tree.map(lambda g, size=size: size * g, gradients_at(0)) for size in sizes]


@pytest.mark.parametrize("num_steps", [1000, 4000, 100_000])
@pytest.mark.parametrize("smallest", [0.5, 0.02, 1e-4])
def test_steps_fade_with_the_gradient(num_steps, smallest):
    """The direction is the same throughout, and so is the step but for its size and the decay."""
    sizes = [0.3] * 6 + [0.3 * smallest] * 60
    gradients = sized_gradients(sizes)
    state, squared = plain().init(params()), []
    adam = optax.scale_by_adam(0.9, 1 - 1 / np.clip(0.2 * num_steps, 200, 1000), eps=1e-8)
    moments = adam.init(params())
    for step, gradient in enumerate(gradients):
        squared.append(float(optax.tree.norm(gradient)) ** 2)
        moved, new = update(gradient, state, num_steps=num_steps, weight_decay=0.0)
        decayed, _ = update(gradient, state, num_steps=num_steps, weight_decay=1.0)
        state = new
        factor = factor_by_numpy(squared, num_steps)
        sizes = shrinking(num_steps) * schedule_by_numpy(step, num_steps) * factor
        size = 0.019 * sizes
        got = moved["Dense_0"]["kernel"]
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(got))), size, rtol=1e-3)
        direction, moments = adam.update(gradient, moments)
        expected = -0.008 * sizes * direction["Dense_0"]["bias"]
        np.testing.assert_allclose(moved["Dense_0"]["bias"], expected, rtol=1e-3)
        # what no step shrinks decays by the rest of the fraction
        kernel = params()["Dense_0"]["kernel"]
        share = np.where(got * kernel <= 0, 1, 1 - factor)
        expected = -decay_at(step, num_steps) * share * kernel
        difference = np.float64(decayed["Dense_0"]["kernel"]) - got
        np.testing.assert_allclose(difference, expected, rtol=1e-2, atol=1e-6)
    assert (factor < 1) == (num_steps > 1000 and smallest < 0.3)


def test_steps_come_back_with_the_gradient():
    """Also after gradients that were zero from the start."""
    zeros, one = sized_gradients([0.0, 0.3])
    state = plain().init(params())
    for _ in range(3):
        updates, state = update(zeros, state, num_steps=5000, weight_decay=0.0)
        assert not any(map(jnp.any, jax.tree.leaves(updates)))
    assert all(map(jnp.isfinite, state.norms))
    updates, state = update(one, state, num_steps=5000, weight_decay=0.0)
    size = np.sqrt(np.mean(np.square(updates["Dense_0"]["kernel"])))
    np.testing.assert_allclose(size, 0.019 * 5**-0.25 * schedule_by_numpy(3, 5000), rtol=1e-2)


# -- embeddings, heads and vectors ----------------------------------------------------------------

ADAM_LEAVES = {  # rate of each, and whether it decays
    ("Embed_0", "embedding"): (0.02, True),
    ("head", "kernel"): (0.016, True),  # 3 / 6 inputs is more than the limit
    ("Dense_0", "bias"): (0.008, False),
    ("LayerNorm_0", "scale"): (0.008, False),
}


def test_the_rest_is_adamw():
    got = trajectory(3)
    adam = optax.scale_by_adam(0.9, 0.995, eps=1e-8)
    expected, state = params(), adam.init(params())
    for step in range(3):
        updates, state = adam.update(clipped(gradients_at(step)), state)
        rate = growth(NUM_STEPS) * schedule_by_numpy(step, NUM_STEPS)
        decay = decay_at(step, NUM_STEPS)
        expected = {
            (layer, leaf): np.float64(expected[layer][leaf] if step == 0 else expected[layer, leaf])
            * (1 - decay * decays)
            - size * rate * updates[layer][leaf]
            for (layer, leaf), (size, decays) in ADAM_LEAVES.items()
        }
    for (layer, leaf), value in expected.items():
        np.testing.assert_allclose(got[layer][leaf], value, rtol=2e-5, atol=1e-6)


def test_rates_of_wide_heads_fall_with_their_inputs():
    wide = {"head": {"kernel": jax.ShapeDtypeStruct((600, 10), jnp.float32)}}
    (plan,) = lopt_jax.lopt(1000).plans(wide)
    assert plan.scale == pytest.approx(3 / 600)
    (plan,) = lopt_jax.lopt(125).plans(wide)  # an eighth of 1000: its cube root is a half
    assert plan.scale == pytest.approx(2 * 3 / 600)


def test_matrices_of_fewer_outputs_than_inputs_make_smaller_steps():
    of = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}  # noqa: E731
    layers = {"a": of(16, 256), "b": of(64, 16), "c": of(16, 16), "d": of(256, 16)}
    layers["head"] = of(16, 2)
    wide, narrow, square, bottleneck, _ = (plan.scale for plan in plain().plans(layers))
    assert square == pytest.approx(0.038 / 4)
    assert wide == pytest.approx(square)
    assert narrow == pytest.approx(square / 2**0.5)  # the fourth root of 16 / 64
    # beyond four times as many inputs they fall with the ratio itself
    assert bottleneck == pytest.approx(narrow / 4)
    said = {leaf.path: leaf.reason for leaf in lopt_jax.describe(plain(), layers).leaves}
    assert [path for path in said if "a bottleneck" in said[path]] == ["['d']['kernel']"]


def test_the_window_of_a_convolution_makes_no_bottleneck():
    of = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}  # noqa: E731
    layers = {"Conv_0": of(3, 3, 8, 8), "Conv_1": of(3, 3, 64, 8), "head": of(8, 2)}
    same, fewer, _ = (plan.scale for plan in plain().plans(layers))
    assert same == pytest.approx(0.038 / 8**0.5 / 9**0.25)
    assert fewer == pytest.approx(
        0.038 / 8**0.5 / 72**0.25 / 2**0.75
    )  # twice as many as four times


@pytest.mark.parametrize(("num_steps", "times"), [(600, 1), (1000, 1), (16_000, 0.5)])
@pytest.mark.parametrize(
    ("role", "size"), [("matrix", 0.019), ("embedding", 0.02), ("head", 0.016), ("vector", 0.008)]
)
def test_long_trainings_make_smaller_steps(role, size, num_steps, times):
    layers = {"Dense_0": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}}
    larger = 1 if role == "matrix" else growth(num_steps)
    for steps in (num_steps, jnp.int32(num_steps)):
        (plan,) = lopt_jax.lopt(steps, label_fn=lambda *_: role).plans(layers)
        assert plan.scale == pytest.approx(size * larger * times)


@pytest.mark.parametrize(
    ("num_steps", "decay"), [(100, 0.02), (1000, 0.012), (32_000, 0.0015)]
)  # the last: four times as much over the training as one of 1,000 steps
def test_long_trainings_decay_more(num_steps, decay):
    kernel = params()["Dense_0"]["kernel"]
    still = jax.tree.map(jnp.zeros_like, params())
    state = plain().init(params())._replace(count=jnp.int32(0.1 * num_steps))  # full steps
    updates, _ = update(still, state, num_steps=num_steps)
    np.testing.assert_allclose(updates["Dense_0"]["kernel"], -decay * kernel, rtol=1e-3)


@pytest.mark.parametrize(
    ("num_steps", "window"), [(10, 200), (1000, 200), (2500, 500), (5000, 1000), (10**6, 1000)]
)
def test_windows_of_adam(num_steps, window):
    for steps in (num_steps, jnp.int32(num_steps)):
        first, second = adam_betas(steps, RECIPE)
        assert first == 0.9
        assert 1 / (1 - second) == pytest.approx(window, rel=1e-4)


def test_what_the_state_keeps():
    """Of a matrix its momentum, of an embedding two moments, and of what is not read one number."""
    sizes = jax.tree.map(jnp.size, plain().init(params()).accumulators)
    (momentum,) = sizes.momentum
    assert (momentum["Dense_0"]["kernel"], sizes.second_moment["Dense_0"]["kernel"]) == (24, 1)
    embedding = momentum["Embed_0"]["embedding"], sizes.second_moment["Embed_0"]["embedding"]
    assert embedding == (28, 28)
    assert jax.tree.leaves((sizes.row, sizes.column)) == []
    assert jax.tree.map(jnp.shape, tuple(plain().init(params()).norms)) == ((), ())


def test_weights_of_the_celo2_family_say_the_same():
    """A network of two hidden units whose output is the same sum: relu(x) - relu(-x)."""
    names = [feature.name for feature in velo_features().factored]
    column = np.zeros(len(names), np.float32)
    column[[names.index("gradient"), names.index("momentum_0")]] = 1.0
    mlp = {
        "w0": np.stack([column, -column], axis=1),
        "b0": np.zeros(2, np.float32),
        "w1": np.float32([[1, 0, 0], [-1, 0, 0]]),
        "b1": np.zeros(3, np.float32),
    }
    config = {"hidden_size": 2, "hidden_layers": 1, "exp_mult": 0.0}
    network = lopt_jax.Weights("celo2", config, {"mlp": mlp})
    got = trajectory_of(lopt_jax.lopt(NUM_STEPS, network), 3)
    assert_close(got, trajectory_of(plain(), 3), 1e-5, 1e-6)


# -- what is left alone ---------------------------------------------------------------------------


def without(tree, layer):
    return {**tree, layer: jax.tree.map(jnp.zeros_like, tree[layer])}


@pytest.mark.parametrize("layer", ["Dense_0", "head", "Embed_0"])
def test_what_has_a_zero_gradient_does_not_move(layer):
    gradients = lambda step: without(gradients_at(step), layer)  # noqa: E731
    got = trajectory(3, gradients, weight_decay=0.0)
    jax.tree.map(np.testing.assert_array_equal, got[layer], params()[layer])
    for other in set(params()) - {layer}:
        assert not np.array_equal(*(jax.tree.leaves(tree[other])[0] for tree in (got, params())))


def test_an_idle_expert_does_not_move():
    experts = optimizers.random_like({"experts": {"kernel": jnp.zeros((3, 6, 8))}}, 0)
    gradients = optimizers.random_like(experts, 1)["experts"]["kernel"].at[1].set(0)
    tx = lopt_jax.lopt(NUM_STEPS, weight_decay=0, stacked_axes=1)
    got = trajectory_of(tx, 2, lambda step: {"experts": {"kernel": gradients}}, experts)
    moved = np.abs(got["experts"]["kernel"] - experts["experts"]["kernel"]).max((1, 2))
    assert moved[1] == 0
    assert min(moved[[0, 2]]) > 1e-3


def test_stop_gradient():
    tree = optimizers.random_like({"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}, 0)
    loss = lambda t: jnp.sum(jnp.square(jax.lax.stop_gradient(t["a"]) @ t["b"]))  # noqa: E731
    gradients = jax.grad(loss)(tree)
    tx = lopt_jax.lopt(NUM_STEPS, weight_decay=0)
    got = trajectory_of(tx, 1, lambda step: gradients, tree)
    np.testing.assert_array_equal(got["a"], tree["a"])
    assert not np.array_equal(got["b"], tree["b"])


def test_zero_gradients_everywhere_only_decay():
    zeros = jax.tree.map(jnp.zeros_like, params())
    updates, _ = update(zeros)
    fraction = decay_at(0, NUM_STEPS)
    for layer, leaf, decays in (
        ("Dense_0", "kernel", 1),
        ("Embed_0", "embedding", 1),
        ("Dense_0", "bias", 0),
    ):
        expected = -fraction * decays * np.asarray(params()[layer][leaf])
        np.testing.assert_allclose(updates[layer][leaf], expected, rtol=1e-5, atol=1e-12)


def test_a_model_of_scalars():
    scalars = {"a": jnp.float32(1.0), "b": jnp.float32(-2.0), "c": {"d": jnp.zeros((1, 1))}}
    loss = lambda t: (t["a"] - 1.2) ** 2 + (t["b"] + 2.3) ** 2 + jnp.sum(t["c"]["d"] - 0.1) ** 2  # noqa: E731
    tx = lopt_jax.lopt(60)

    @jax.jit
    def train(tree):
        def step(carry, _):
            tree, state = carry
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            return (optax.apply_updates(tree, updates), state), None

        return jax.lax.scan(step, (tree, tx.init(tree)), length=60)[0][0]

    assert loss(train(scalars)) < 1e-2 * loss(scalars)


# -- arguments ------------------------------------------------------------------------------------


def test_traced_numbers_are_those_of_python():
    tx = lopt_jax.lopt(NUM_STEPS, learning_rate=lambda count: 0.5 / (1 + count), weight_decay=0.5)
    got, _ = tx.update(gradients_at(0), tx.init(params()), params())
    assert_close(got, update(gradients_at(0), learning_rate=0.5, weight_decay=0.5)[0])


def test_learning_rate_multiplies_steps_alone():
    """What decays is not what the rate multiplies."""
    first = functools.partial(update, gradients_at(0))
    step, half = (first(weight_decay=0.0, learning_rate=rate)[0] for rate in (1.0, 0.5))
    assert_close(half, jax.tree.map(lambda u: 0.5 * u, step))
    decayed, decayed_half = (first(learning_rate=rate)[0] for rate in (1.0, 0.5))
    minus = lambda x, y: jax.tree.map(lambda a, b: a - b, x, y)  # noqa: E731
    assert_close(minus(decayed_half, half), minus(decayed, step), 1e-3, 1e-7)
    expected = -decay_at(0, NUM_STEPS) * params()["Embed_0"]["embedding"]
    decay = minus(decayed, step)["Embed_0"]["embedding"]
    np.testing.assert_allclose(decay, expected, rtol=1e-3, atol=1e-8)


def test_label_fn_and_matrix_axes():
    tree = {"x": jnp.zeros((4, 5)), "y": jnp.zeros((4, 5)), "z": jnp.zeros((2, 3, 4))}
    labels = {"x": "learned", "y": "adamw", "z": None}
    tx = lopt_jax.lopt(
        NUM_STEPS,
        label_fn=lambda path, leaf: labels[path[0].key],
        matrix_axes=lambda path, leaf: ((0, 1), (2,)) if leaf.ndim == 3 else None,
    )
    plans = dict(zip(tree, tx.plans(tree), strict=True))
    assert [plan.rule for plan in plans.values()] == ["learned", "adamw", "learned"]
    assert plans["y"].scale == pytest.approx(RECIPE.embedding * growth(NUM_STEPS))
    assert plans["z"].scale == pytest.approx(0.038 / 2 * (4 / 6) ** 0.25)  # matrices of (6, 4)
    for role, size in (("norm", 0.008), ("head", 0.016), ("matrix", 0.019)):
        labelled = lopt_jax.lopt(1000, label_fn=lambda path, leaf, role=role: role)
        (plan,) = labelled.plans({"x": tree["x"]})
        assert plan.scale == pytest.approx(size)
        assert plan.decay == (role != "norm")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": "many"}, TypeError, "num_steps"),
        ({"label_fn": "adamw"}, TypeError, "label_fn: expected a function"),
        ({"label_fn": lambda *_: "muon"}, ValueError, r"label_fn: .*\['Dense_0'\].*'muon'"),
        ({"label_fn": lambda *_: "matrix"}, ValueError, r"\['Dense_0'\]\['bias'\] of rank 1"),
        ({"matrix_axes": "first"}, TypeError, "matrix_axes: .*found 'first'"),
        ({"matrix_axes": lambda *_: (0, 7)}, ValueError, r"matrix_axes: .*\['Dense_0'\]"),
        ({"recipe": {"decay": 1}}, TypeError, r"recipe: expected a lopt_jax.Recipe, found dict"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate"),
        ({"weight_decay": "much"}, TypeError, "weight_decay"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"precision": "half"}, ValueError, "precision"),
        ({"weights": "celo_small"}, lopt_jax.WeightsError, "celo2"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, says):
    with pytest.raises(error, match=says):
        lopt_jax.lopt(**{"num_steps": 10, **arguments}).init(params())


def test_another_recipe():
    tx = lopt_jax.lopt(NUM_STEPS, weight_decay=0, recipe=lopt_jax.Recipe(matrix=0.076))
    double, _ = tx.update(gradients_at(0), tx.init(params()), params())
    single, _ = update(gradients_at(0), weight_decay=0.0)
    kernel = single["Dense_0"].pop("kernel")
    np.testing.assert_allclose(double["Dense_0"].pop("kernel"), 2 * kernel, rtol=1e-5)
    assert_close(double, single)
