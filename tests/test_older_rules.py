"""nn_adam and rnn_mlp_lopt on random trees, against their formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest

import lopt_jax

STEPS = 6
NAMES = ("nn_adam", "rnn_mlp_lopt")
both = pytest.mark.parametrize("name", NAMES)


def random_tree(seed):
    """Leaves of ranks 0 to 5, unit dimensions among them, of different sizes."""
    rng = np.random.default_rng(seed)
    params = {"scalar": np.float32(rng.normal())}
    for i in range(4):
        shape = tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, 6)))
        size = 10.0 ** rng.uniform(-2, 1)
        params[f"leaf_{i}"] = np.asarray(size * rng.normal(size=shape), np.float32)
    return params


def random_gradients(params, seed):
    """Of one step: of different sizes, one element far too large."""
    rng = np.random.default_rng(seed)
    size = lambda: 10.0 ** rng.uniform(-3, 0)  # noqa: E731
    made = {k: np.asarray(size() * rng.normal(size=p.shape), np.float32) for k, p in params.items()}
    made["leaf_0"].reshape(-1)[0] = 5e3
    return made


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(theta, x, state):
    """Haiku's cell, a row a tensor."""
    hidden, cell = state
    gates = np.concatenate([x, hidden], 1) @ theta["w"] + theta["b"]
    i, g, f, o = np.split(gates, 4, axis=1)
    cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


def log_abs(x):
    return np.clip(np.log(1e-8 + np.abs(x)), -5, 5)


def in_order(features):
    """Features by name, in alphabetical order, joined."""
    return np.concatenate([np.atleast_1d(features[name]) for name in sorted(features)])


class NNAdam:
    """`NNAdam` of google/learned_optimization, for one tree."""

    def __init__(self, theta, params):
        self.theta = theta
        rows = lambda x: np.repeat(x[None], len(params), 0)  # noqa: E731
        cell = theta["lstm"]
        self.lstm = rows(cell["initial_hidden"]), rows(cell["initial_cell"])
        names = ("learning_rate", "beta1", "beta2", "epsilon")
        start = np.array([theta["initial"][name] for name in names], np.float32)
        self.x = dict.fromkeys(params, start)
        self.m = {key: np.zeros(p.shape) for key, p in params.items()}
        self.v = {key: np.zeros(p.shape) for key, p in params.items()}

    @staticmethod
    def values(x):
        """In float32: rounding a beta is part of the rule."""
        ten, one = np.float32(10), np.float32(1)
        rate = np.clip(np.exp(ten * x[0]), 1e-8, 1e3)
        betas = [one - np.exp(np.clip(ten * y, -10, 0)) for y in x[1:3]]
        return rate, *betas, np.clip(np.exp(ten * x[3]), 1e-11, 1e4)

    def step(self, params, gradients, loss):
        del loss
        new, inputs = {}, []
        for key, p in params.items():
            g = np.clip(gradients[key], -1000, 1000)
            rate, beta1, beta2, epsilon = map(float, self.values(self.x[key]))
            m = self.m[key] = beta1 * self.m[key] + (1 - beta1) * g
            v = self.v[key] = beta2 * self.v[key] + (1 - beta2) * g * g
            new[key] = p - rate * (1 + epsilon) / (epsilon + np.sqrt(v + 1e-10)) * m
            x = np.clip(self.x[key], -5, 5) * 0.2
            features = {"lr": x[0], "beta1": x[1], "beta2": x[2], "epsilon": x[3]}
            features["is_scalar"] = 1.0 if p.ndim == 0 else -1.0
            features["is_bias"] = 1.0 if p.ndim == 1 else -1.0
            for letter, array in (("g", g), ("m", m), ("p", p)):
                features[f"mean_{letter}_mag"] = 0.5 * log_abs(array.mean())
                features[f"mean_{letter}_sign"] = np.sign(array.mean())
                features[f"var_{letter}"] = 0.5 * log_abs(array.var())
            features["mean_gabs_mag"] = 0.5 * log_abs(np.abs(g).mean())
            features["mean_rms"] = 0.5 * log_abs(v.mean())
            features["mean_sign"] = np.sign(v.mean())
            features["var_rms"] = 0.5 * log_abs(v.var())
            inputs.append(in_order(features))
        self.lstm = lstm(self.theta["lstm"], np.stack(inputs), self.lstm)
        moves = self.lstm[0] @ self.theta["controls"]["w"] + self.theta["controls"]["b"]
        for key, move in zip(params, moves, strict=True):
            rate, beta1, beta2, epsilon = self.values(np.float32(self.x[key] + 0.01 * move))
            insides = (rate, np.float32(1) - beta1, np.float32(1) - beta2, epsilon)
            self.x[key] = np.float32(0.1) * np.log(np.float32(insides))
        return new


class RNNMLPLOpt:
    """`RNNMLPLOpt` of google/learned_optimization, for one tree."""

    decays = np.array([0.5, 0.9, 0.99, 0.999, 0.9999])

    def __init__(self, theta, params):
        self.theta = theta
        rows = lambda x: np.repeat(x[None], len(params), 0)  # noqa: E731
        cell = theta["lstm"]
        self.lstm = rows(cell["initial_hidden"]), rows(cell["initial_cell"])
        self.from_mlp = rows(theta["initial_from_mlp"])
        self.from_lstm = theta["initial_from_lstm"]
        self.m = {key: np.zeros((*p.shape, 5)) for key, p in params.items()}
        self.v = {key: np.zeros((*p.shape, 5)) for key, p in params.items()}
        self.mean = self.var = 0.0
        self.valid_mean, self.valid_count = 0.0, 0
        self.clip, self.updates, self.t = 0.01, 0, 0

    def observe(self, loss):
        self.valid_mean = 0.95 * self.valid_mean + 0.05 * loss
        self.valid_count += 1
        self.t += 1

    def loss_feature(self, loss):
        c = 1 / (1 - 0.9**self.updates + 1e-8)
        return np.clip((loss - self.mean * c) / np.sqrt(self.var * c + 1e-8), -5, 5)

    def step(self, params, gradients, loss):
        theta, self.updates = self.theta, self.updates + 1
        self.mean = 0.9 * self.mean + 0.1 * loss
        self.var = 0.9 * self.var + 0.1 * (self.mean - loss) ** 2
        seen = self.valid_count
        valid = self.valid_mean / (1 - 0.95**seen + 1e-8) if seen else 0.0
        bound = 10 * self.clip / (1 - 0.99**self.updates)
        g = {key: np.clip(x, -bound, bound) for key, x in gradients.items()}
        mean_square = np.mean([np.mean(x**2) for x in g.values()])
        self.clip = 0.99 * self.clip + 0.01 * np.sqrt(1e-8 + mean_square)
        inputs = []
        for i, (key, p) in enumerate(params.items()):
            m = self.m[key] = self.decays * self.m[key] + (1 - self.decays) * g[key][..., None]
            v = self.decays * self.v[key] + (1 - self.decays) * g[key][..., None] ** 2
            self.v[key] = v
            features = {"from_lstm": self.from_lstm, "from_mlp": self.from_mlp[i]}
            features |= {"g_norm": log_abs(np.sqrt(np.sum(g[key] ** 2)))}
            features |= {"norm_weight": log_abs(np.sqrt(np.sum(p**2)))}
            features |= {"is_scalar": 1.0 if p.ndim == 0 else -1.0}
            features |= {"mean_ms_mag": log_abs(m.mean()), "mean_ms_sign": np.sign(m.mean())}
            features |= {"mean_rms": log_abs(v.mean()), "mean_sign": np.sign(v.mean())}
            features |= {"mean_v_mag": log_abs(p.mean()), "mean_v_sign": np.sign(p.mean())}
            features |= {"var_ms": log_abs(m.var()), "var_rms": log_abs(v.var())}
            features |= {"var_v": log_abs(p.var())}
            dims = [*p.shape, 1, 1, 1, 1]
            features |= {f"shape_{j}": np.log(dims[j]) - 1 for j in range(4)}
            features |= {"train_loss_feat": self.loss_feature(loss)}
            features |= {"valid_loss_feat": self.loss_feature(valid)}
            inputs.append(in_order(features))
        self.lstm = lstm(theta["lstm"], np.stack(inputs), self.lstm)
        linear = lambda name: self.lstm[0] @ theta[name]["w"] + theta[name]["b"]  # noqa: E731
        self.from_lstm, said = linear("to_lstm").mean(0), linear("to_mlp")
        scales = np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])
        new, answers = {}, []
        for i, (key, p) in enumerate(params.items()):
            m, v = self.m[key].reshape(-1, 5), self.v[key].reshape(-1, 5)
            r = 1 / np.sqrt(v + 1e-6)
            column = lambda x: np.reshape(x, (-1, 1))  # noqa: E731
            x = [column(g[key]), column(p), np.log(np.abs(column(p)) + 1e-8), m, v, m * r, r]
            x = np.concatenate(x, 1)
            x = x / np.sqrt(1e-5 + np.mean(x**2, 0))
            shared = np.concatenate(
                [
                    np.sin(self.t / (scales * np.pi)),
                    [np.log(len(params)) - 1, np.log(np.sqrt(np.sum(p**2)) + 1e-8), np.log(p.size)],
                    said[i],
                ]
            )
            x = np.concatenate([x, np.repeat(shared[None], len(x), 0)], 1)
            layers = len(theta["mlp"]) // 2
            for layer in range(layers):
                x = (np.maximum(x, 0) if layer else x) @ theta["mlp"][f"w{layer}"]
                x = x + theta["mlp"][f"b{layer}"]
            new[key] = p - (x[:, 0] * np.exp(0.001 * x[:, 1]) * 0.001).reshape(p.shape)
            answers.append(x[:, 2:].mean(0))
        self.from_mlp = np.stack(answers)
        self.t += 1
        return new


SPECIFICATIONS = {"nn_adam": NNAdam, "rnn_mlp_lopt": RNNMLPLOpt}


@both
@pytest.mark.parametrize("seed", [0, 1])
def test_random_trees(name, seed):
    """As near as the recorded runs have to be; nn_adam's betas are rounded: twice that."""
    start = random_tree(seed)
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
    weights = optimizers.weights(name)
    specification = SPECIFICATIONS[name](wide(weights.params), wide(start))
    tx, expected, params = optimizers.plain(name), wide(start), jax.tree.map(jnp.asarray, start)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(STEPS):
        loss = np.float32(2.0 - 0.3 * step)
        if name == "rnn_mlp_lopt" and step % 3 == 2:
            state = lopt_jax.observe_validation_loss(state, loss + 0.5)
            specification.observe(float(loss) + 0.5)
        gradients = random_gradients(start, 10 * seed + step)
        updates, state = update(gradients, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        expected = specification.step(expected, wide(gradients), float(loss))
        for key, want in expected.items():
            error = np.max(np.abs(np.asarray(params[key], np.float64) - want))
            moved = np.max(np.abs(want - start[key]))
            bound = 5e-5 * moved + 1e-6 * np.max(np.abs(want))
            assert error <= 2 * bound, f"step {step}, {key}: {error / bound:.2f} times the bound"


@both
def test_what_has_no_gradient_is_not_there(name):
    """`None` gives the numbers that `optax.masked` gives, and keeps the rows of the state."""
    params = jax.tree.map(jnp.asarray, random_tree(3))
    frozen = ("leaf_1", "scalar")
    tx = optimizers.plain(name)
    masked = optax.masked(tx, {key: key not in frozen for key in params})
    state, of_masked = tx.init(params), masked.init(params)
    first = state
    for step in range(3):
        gradients = random_gradients(params, step)
        holes = {key: None if key in frozen else g for key, g in gradients.items()}
        updates, state = tx.update(holes, state, params, value=1.0)
        expected, of_masked = masked.update(gradients, of_masked, params, value=1.0)
        for key in params:
            if key in frozen:
                assert updates[key] is None
            else:
                np.testing.assert_allclose(updates[key], expected[key], rtol=1e-5, atol=1e-9)
    rows = [sorted(params).index(key) for key in frozen]
    for now, before in zip(state.lstm, first.lstm, strict=True):
        np.testing.assert_array_equal(now[rows,], before[rows,])
        assert np.abs(np.delete(now, rows, 0) - np.delete(before, rows, 0)).max() > 0


@both
def test_stacked_layers_are_tensors(name):
    """A stack of two layers and two leaves of one layer make the same steps."""
    apart = {k: p for k, p in random_tree(4).items() if k != "scalar"}
    apart |= {f"more_{k}": (p + 0.1).astype(np.float32) for k, p in apart.items()}
    join = lambda tree: {  # noqa: E731
        k: jnp.stack([tree[k], tree[f"more_{k}"]]) for k in tree if not k.startswith("more_")
    }
    tx, stacked = optimizers.plain(name), optimizers.make(name, stacked_axes=1)
    params, joined = jax.tree.map(jnp.asarray, apart), join(apart)
    state, of_stacked = tx.init(params), stacked.init(joined)
    for step in range(3):
        gradients = random_gradients(apart, step)
        updates, state = tx.update(gradients, state, params, value=1.0)
        of_joined, of_stacked = stacked.update(join(gradients), of_stacked, joined, value=1.0)
        for key, want in join(updates).items():
            np.testing.assert_allclose(of_joined[key], want, rtol=2e-5, atol=1e-9)


@both
def test_a_step_without_any_gradient(name):
    tx, params = optimizers.plain(name), {"w": jnp.ones((3, 2)), "empty": jnp.zeros((0, 2))}
    state = tx.init(params)
    updates, after = tx.update({"w": None, "empty": None}, state, params, value=1.0)
    assert updates == {"w": None, "empty": None}
    assert int(after.count) == 1
    jax.tree.map(np.testing.assert_array_equal, after.lstm, state.lstm)
    jax.tree.map(np.testing.assert_array_equal, after.accumulators, state.accumulators)


def test_validation_losses_are_told_through_wrappers():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizers.plain("rnn_mlp_lopt"))
    params = {"w": jnp.ones((3, 2))}
    state = lopt_jax.observe_validation_loss(tx.init(params), 0.7)
    inner = state[1]
    assert (int(inner.count), int(inner.validation_loss.count)) == (1, 1)
    np.testing.assert_allclose(inner.validation_loss.mean, 0.05 * 0.7, rtol=1e-6)
    unchanged = lopt_jax.observe_validation_loss(state, jnp.nan)[1].validation_loss
    jax.tree.map(np.testing.assert_array_equal, unchanged, inner.validation_loss)
    with pytest.raises(ValueError, match=r"loss: expected a scalar; found shape \(2,\)"):
        lopt_jax.observe_validation_loss(state, jnp.ones(2))
    others = optimizers.plain("nn_adam").init(params)
    with pytest.raises(ValueError, match="state: expected one with a RNNMLPLoptState"):
        lopt_jax.observe_validation_loss(others, 0.7)
