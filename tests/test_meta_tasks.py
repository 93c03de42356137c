"""Tasks' losses against plain numpy, and augmentation against its definition."""

import hashlib
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lopt_jax.meta import data
from lopt_jax.meta.augmentation import Reparametrised, Stacked
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.networks import ConvNet, Rnn, Transformer
from lopt_jax.meta.tasks import (
    Characters,
    Quadratic,
    data_hashes,
    held_out_tasks,
    training_tasks,
)

TRAINING, HELD_OUT = training_tasks(), held_out_tasks()


def softmax_loss(logits, targets):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, np.asarray(targets)[..., None], -1)
    return -picked.mean()


def numpy_activation(x, index):
    if index == 0:
        return np.maximum(x, 0)
    if index == 1:
        return np.tanh(x)
    if index == 2:  # gelu, tanh form
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


def to_numpy(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("name", ["tables_mlp_32x2", "digits_mlp_64", "diabetes_mlp"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mlp_losses_equal_numpy(name, seed):
    task = TRAINING[name]
    keys = jax.random.split(jax.random.key(seed), 3)
    content = task.sample(keys[0])
    params = task.init(keys[1], content)
    batch = task.batch(keys[2], content, "train")
    x = np.asarray(batch.inputs, np.float64)
    layers = to_numpy(params)
    count = len(layers)
    for i in range(count):
        x = x @ layers[f"layer{i}"]["w"] + layers[f"layer{i}"]["b"]
        if i < count - 1:
            x = numpy_activation(x, int(content.activation))
    if name == "diabetes_mlp":
        expected = np.mean((x - np.asarray(batch.targets)) ** 2)
    else:
        expected = softmax_loss(x, batch.targets)
    assert float(task.loss(params, content, batch)) == pytest.approx(expected, rel=2e-5)


def test_convolution_equals_direct_sums():
    network = ConvNet(8, (3, 4), 5)
    params = network.init(jax.random.key(0), jnp.float32(1.0))
    inputs = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    x = inputs.reshape(2, 8, 8, 1).astype(np.float64)
    tree = to_numpy(params)
    for i, stride in ((0, 1), (1, 2)):
        kernel, bias = tree[f"conv{i}"]["w"], tree[f"conv{i}"]["b"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        size = x.shape[1] // stride
        out = np.zeros((2, size, size, kernel.shape[-1]))
        for row in range(size):
            for column in range(size):
                window = padded[:, row * stride : row * stride + 3, column * stride :][:, :, :3]
                out[:, row, column] = np.einsum("bijc,ijcd->bd", window, kernel) + bias
        x = np.maximum(out, 0)
    expected = x.mean((1, 2)) @ tree["head"]["w"] + tree["head"]["b"]
    found = network.apply(params, jnp.asarray(inputs), jnp.int32(0))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_recurrent_network_equals_a_loop():
    network = Rnn(7, 5)
    params = network.init(jax.random.key(1), jnp.float32(1.0))
    tokens = np.array([[1, 3, 2, 6], [0, 0, 5, 4]])
    tree = to_numpy(params)

    def dense(layer, x):
        return x @ layer["w"] + layer["b"]

    hidden = np.zeros((2, 5))
    logits = []
    for t in range(4):
        x = tree["embedding"][tokens[:, t]]
        gates = 1 / (1 + np.exp(-dense(tree["gates"], np.concatenate([x, hidden], -1))))
        reset, update = gates[:, :5], gates[:, 5:]
        candidate = np.tanh(dense(tree["candidate"], np.concatenate([x, reset * hidden], -1)))
        hidden = update * hidden + (1 - update) * candidate
        logits.append(dense(tree["head"], hidden))
    found = network.apply(params, jnp.asarray(tokens), jnp.int32(0))
    np.testing.assert_allclose(found, np.stack(logits, 1), rtol=1e-4, atol=1e-5)


def test_transformer_is_causal_over_tokens():
    network = Transformer(11, 8, 2, 2, 6)
    params = network.init(jax.random.key(0), jnp.float32(1.0))
    tokens = jnp.array([[1, 2, 3, 4, 5, 6]])
    changed = tokens.at[0, 4].set(9)
    first = network.apply(params, tokens, jnp.int32(0))
    second = network.apply(params, changed, jnp.int32(0))
    np.testing.assert_allclose(first[:, :4], second[:, :4], atol=1e-6)
    assert np.abs(np.asarray(first[:, 4:] - second[:, 4:])).max() > 1e-3


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of prepared data: tiny files of each kind."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 10
    np.savez(
        tmp_path / "fashion_mnist.npz",
        train_images=rng.integers(0, 256, (20, 28, 28), np.uint8), train_labels=labels[:20],
        test_images=rng.integers(0, 256, (4, 28, 28), np.uint8), test_labels=labels[20:],
    )  # fmt: skip
    # Class 3 is the largest, and 7 has one picture alone.
    np.savez(
        tmp_path / "clipart.npz",
        images=rng.integers(0, 256, (26, 32, 32, 3), np.uint8),
        labels=np.array([3] * 5 + [7] + 2 * [0, 1, 2, 4, 5, 6, 8, 9, 10, 11], np.uint8),
    )
    (tmp_path / "brown.txt.xz").write_bytes(lzma.compress(b"The Fulton County " * 99))
    monkeypatch.setenv("LOPT_JAX_DATA", str(tmp_path))
    return tmp_path


def test_pictures_are_made_smaller_and_standardised(pictures):
    with np.load(pictures / "fashion_mnist.npz") as file:
        raw = {name: file[name] for name in file}
    found = data.load_pictures("fashion_mnist", 8)
    canvas = np.pad(raw["train_images"][3].astype(np.float64), 2)
    assert found.images[3, 2, 5, 0] == np.rint(canvas[8:12, 20:24].mean())
    assert found.images[3, 0, 0, 0] == np.rint(canvas[:4, :4].mean())
    np.testing.assert_array_equal(found.labels, [*raw["train_labels"], *raw["test_labels"]])
    assert found.num_train == 20
    task = TRAINING["fashion_mlp_8"]
    train = task.examples(task.sample(jax.random.key(0)), "train", 512)
    assert train.inputs.shape == (20, 64)
    assert np.abs(np.mean(train.inputs)) < 1e-5
    assert np.std(train.inputs) == pytest.approx(1.0, abs=1e-5)
    valid = task.source.examples((), "valid", 512)
    np.testing.assert_array_equal(valid.targets, raw["test_labels"])
    drawn = task.source.batch(jax.random.key(1), (), "valid", 64).targets
    assert set(np.asarray(drawn)) <= set(raw["test_labels"])


def test_clip_arts_are_those_of_the_ten_largest_classes(pictures):
    colour = data.load_pictures("clipart", 16, 3)
    assert colour.images.shape == (23, 16, 16, 3)
    # 3 is the most frequent; 11 and 7 are left out.
    np.testing.assert_array_equal(np.bincount(colour.labels), [5] + 9 * [2])
    assert colour.num_train == 18
    with np.load(pictures / "clipart.npz") as file:
        small = file["images"].astype(np.float64).reshape(26, 16, 2, 16, 2, 3).mean((2, 4))
    kept = {tuple(np.rint(image).ravel()) for image in small}
    assert {tuple(image.ravel()) for image in colour.images} <= kept
    assert data.load_pictures("clipart", 8).images.shape == (23, 8, 8, 1)


def test_errors_of_pictures_say_what_to_do(pictures, monkeypatch):
    with pytest.raises(ValueError, match="side: expected a divisor of 32, found 9"):
        data.load_pictures("clipart", 9)
    with pytest.raises(ValueError, match="channels: fashion_mnist has no"):
        data.load_pictures("fashion_mnist", 8, 3)
    with pytest.raises(ValueError, match="name: expected fashion_mnist or clipart, found 'x'"):
        data.load_pictures("x", 8)
    (pictures / "clipart.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"clipart.npz: expected arrays images, labels .*again"):
        data.load_pictures("clipart", 8)
    (pictures / "clipart.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no .*meta.prepare FOLDER clipart"):
        data_hashes([TRAINING["clipart_mlp_8"]])
    monkeypatch.delenv("LOPT_JAX_DATA")
    with pytest.raises(FileNotFoundError, match=r"expected LOPT_JAX_DATA .* found none"):
        data.load_pictures("clipart", 8)


def test_hashes_name_all_data_of_tasks(pictures):
    tasks = [TRAINING[name] for name in ("clipart_mlp_8", "clipart_mlp_16", "tables_mlp_16")]
    found = data_hashes([Reparametrised(tasks[0], 2.0), Stacked(tuple(tasks[1:])), Quadratic()])
    assert set(found) == {"clipart", "digits", "wine"}
    with np.load(pictures / "clipart.npz") as file:
        assert found["clipart"] == data.digest(file["images"], file["labels"])
    total = hashlib.sha256(b"|u1 (2,) \x01\x02")
    assert data.digest(np.array([1, 2], np.uint8)) == total.hexdigest()


@pytest.mark.parametrize("name", [*TRAINING, *HELD_OUT])
def test_every_task_has_finite_losses_and_gradients(name, pictures):
    task = {**TRAINING, **HELD_OUT}[name]
    content = task.sample(jax.random.key(3))
    params = task.init(jax.random.key(4), content)
    batch = task.batch(jax.random.key(5), content, "train")
    loss, gradient = jax.jit(jax.value_and_grad(task.loss))(params, content, batch)
    assert np.isfinite(float(loss))
    assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(gradient))
    valid = task.loss(params, content, task.examples(content, "valid", 512))
    assert np.isfinite(float(valid))


def test_held_out_tasks_are_held_out_by_kind():
    assert not set(TRAINING) & set(HELD_OUT)
    trained_tables = (
        {n for t in TRAINING.values() for n in getattr(t.source, "names", ())}
        if (all(hasattr(t, "source") for t in TRAINING.values()))
        else {
            n for t in TRAINING.values() for n in getattr(getattr(t, "source", None), "names", ())
        }
    )
    assert "breast_cancer" not in trained_tables
    assert "flower" not in trained_tables

    def transformers(tasks):
        return [t for t in tasks if isinstance(getattr(t, "network", None), Transformer)]

    def sources(tasks):
        return {s.text if isinstance(s, Characters) else s for s in (t.source for t in tasks)}

    seen, unseen = transformers(TRAINING.values()), transformers(HELD_OUT.values())
    assert seen
    assert len(unseen) == 3
    assert not sources(seen) & sources(unseen)
    assert not {t.network.width for t in seen} & {t.network.width for t in unseen}
    for name in ("small_fc_lopt", "celo_small", "velo_small", "celo2_small"):
        assert not transformers(TRAINING[task] for task in CONFIGS[name].tasks)


def test_training_and_validation_rows_do_not_overlap():
    for name in ("digits", "wine", "breast_cancer"):
        table = data.load_tabular(name)
        assert 0 < table.num_train < len(table.inputs)
    task = TRAINING["tables_mlp_32x2"]
    content = jax.vmap(task.sample)(jax.random.split(jax.random.key(0), 200)).source
    assert np.all(np.asarray(content.start + content.num_train) <= np.asarray(content.valid_start))
    assert np.asarray(content.num_train).min() < 0.5 * np.asarray(content.num_train).max()
    assert len(np.unique(content.valid_start)) == 2  # digits and wine


def test_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="'mnist'"):
        data.load_tabular("mnist")


@pytest.mark.parametrize("level", ["global", "tensor", "mixed"])
def test_reparametrisation_keeps_the_function_and_scales_the_gradient(level):
    inner = TRAINING["tables_mlp_16"]
    task = Reparametrised(inner, 10.0, level)
    content = task.sample(jax.random.key(2))
    scales = jax.tree.leaves(content.scales)
    assert all(0.1 <= float(s) <= 10.0 for s in scales)
    if level == "global":
        assert len({float(s) for s in scales}) == 1
    params = task.init(jax.random.key(3), content)
    raw = inner.init(jax.random.key(3), content.content)
    batch = task.batch(jax.random.key(4), content, "train")
    loss, gradient = jax.value_and_grad(task.loss)(params, content, batch)
    inner_loss, inner_gradient = jax.value_and_grad(inner.loss)(raw, content.content, batch)
    assert float(loss) == pytest.approx(float(inner_loss), rel=1e-4)
    wanted = jax.tree.map(lambda g, s: g * s, inner_gradient, content.scales)
    for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-5)


def test_stacked_tasks_average_their_losses():
    parts = (TRAINING["tables_mlp_16"], TRAINING["diabetes_mlp"])
    task = Stacked(parts)
    content = task.sample(jax.random.key(0))
    params = task.init(jax.random.key(1), content)
    batch = task.batch(jax.random.key(2), content, "valid")
    losses = [
        float(part.loss(params[f"task{i}"], content[i], batch[i])) for i, part in enumerate(parts)
    ]
    assert float(task.loss(params, content, batch)) == pytest.approx(np.mean(losses), rel=1e-6)
    assert task.name == "tables_mlp_16+diabetes_mlp"


def test_few_rows_with_noisy_labels():
    task = TRAINING["tables_few_mlp_32x2"]
    source = task.source
    targets = source._pool()[1]
    rates, counts = [], []
    for seed in range(20):
        content = source.sample(jax.random.key(seed))
        start, count = int(content.start), int(content.num_train)
        counts.append(count)
        assert count <= 500
        labels = np.asarray(content.labels)
        valid = slice(int(content.valid_start), int(content.valid_start + content.num_valid))
        # Held-out labels are the table's, renamed one to one.
        pairs = set(zip(targets[valid].tolist(), labels[valid].tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        names = dict(pairs)
        rows = slice(start, int(content.valid_start))
        clean = np.array([names.get(t, -1) for t in targets[rows].tolist()])
        rates.append(np.mean(clean != labels[rows]))
        batch = task.batch(jax.random.key(seed), task.sample(jax.random.key(seed)), "train")
        assert batch.inputs.shape == (32, 64)
        examples = source.examples(content, "train", 100)
        wanted = labels[start + np.arange(100) % count]
        np.testing.assert_array_equal(examples.targets, wanted)
    assert min(counts) >= 60
    assert max(counts) > 2 * min(counts)
    assert 0.02 < np.mean(rates) < 0.16
    assert max(rates) < 0.25


def test_a_teacher_of_few_examples_repeats_them():
    source = TRAINING["teacher_few_mlp_32x2"].source
    content = source.sample(jax.random.key(1))._replace(num_train=jnp.int32(5))
    seen = {
        tuple(np.round(row, 4).tolist())
        for row in np.asarray(source.batch(jax.random.key(0), content, "train", 64).inputs)
    }
    assert len(seen) == 5
    kept = source.examples(content, "train", 5).inputs
    assert {tuple(np.round(row, 4).tolist()) for row in np.asarray(kept)} == seen
    fresh = source.batch(jax.random.key(0), content, "valid", 64).inputs
    assert len({tuple(row) for row in np.asarray(fresh).tolist()}) == 64
