"""States that an earlier version saved: they load, and training goes on as it would have there.

`python tests/test_saved_states.py` saves them anew: only where an optimizer's numbers are meant to
change, which its users have to be told.
"""

import os
import pickle
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest

import lopt_jax
from lopt_jax.rules.rule import AccumulatorStatistics

FOLDER = Path(__file__).parent / "fixtures" / "saved_states"
SAVED_AT, GOES_ON = 3, 2  # steps before the state was saved, and after
STRIDE = 37  # of the elements of large arrays that the file has of the last state

SMALL = {"bias": (20,), "conv": (3, 3, 4, 8), "kernel": (12, 20), "scale": ()}
LARGE = {**SMALL, "large": (68, 128)}  # more elements than small tensors have

RUNS = {
    "small_fc_lopt": (lambda: lopt_jax.small_fc_lopt(backend="xla"), LARGE),
    "velo": (lambda: optimizers.make("velo", backend="xla"), LARGE),
    "celo": (lambda: optimizers.make("celo", backend="xla"), SMALL),
    "celo2": (lambda: optimizers.make("celo2", backend="xla"), SMALL),
    "lopt": (lambda: optimizers.make("lopt", backend="xla"), SMALL),
}


def drawn(shapes, seed):
    generator = np.random.default_rng(seed)
    return {k: np.float32(generator.standard_normal(shape)) for k, shape in shapes.items()}


def trained(tx, params, state, steps):
    """Parameters and state after some steps; gradients and losses depend on the step alone."""
    update = jax.jit(optax.with_extra_args_support(tx).update)
    for step in steps:
        gradients = drawn({k: x.shape for k, x in params.items()}, 100 + step)
        loss = jnp.float32(2.0 / (1 + step))
        updates, state = update(gradients, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    return params, state


def here():
    """What decides about the last bit: the processor and how XLA compiles for it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    kept = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    return "\n".join([jax.__version__, os.environ.get("XLA_FLAGS", ""), *kept])


def named(tree):
    return {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree.leaves_with_path(tree)}


def some(x):
    """All of a small array, part of a large one."""
    return x if x.size <= 2048 else x.reshape(-1)[::STRIDE]


def record():
    for name, (make, shapes) in RUNS.items():
        tx = make()
        params = jax.tree.map(jnp.asarray, drawn(shapes, 0))
        saved = trained(tx, params, tx.init(params), range(SAVED_AT))
        last = trained(tx, *saved, range(SAVED_AT, SAVED_AT + GOES_ON))
        arrays = {f"saved{k}": x for k, x in named(saved).items()}
        arrays |= {f"last{k}": some(x) for k, x in named(last).items()}
        np.savez_compressed(FOLDER / f"{name}.npz", here=here(), **arrays)


@pytest.mark.parametrize("name", RUNS)
def test_training_goes_on(name):
    """Bitwise where the state was saved; elsewhere within what float32 and the processor leave."""
    make, shapes = RUNS[name]
    with np.load(FOLDER / f"{name}.npz") as data:
        stored = dict(data)
    tx = make()
    params = jax.tree.map(jnp.asarray, drawn(shapes, 0))
    like = params, tx.init(params)
    names = [f"saved{jax.tree_util.keystr(k)}" for k, _ in jax.tree.leaves_with_path(like)]
    assert names == [k for k in stored if k.startswith("saved")]
    for old, new in zip(map(stored.__getitem__, names), jax.tree.leaves(like), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    saved = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(stored[k]) for k in names])
    last = named(trained(tx, *saved, range(SAVED_AT, SAVED_AT + GOES_ON)))
    is_here = str(stored["here"]) == here()
    for key, x in last.items():
        expected = stored[f"last{key}"]
        if is_here:
            np.testing.assert_array_equal(some(x), expected, err_msg=key)
        moved = np.max(np.abs(expected - some(stored[f"saved{key}"])), initial=0)
        bound = 5e-5 * moved + 1e-6 * np.max(np.abs(expected), initial=0)
        assert np.max(np.abs(some(x) - expected), initial=0) <= bound, key


def test_pickled_states_find_their_classes():
    """Where an earlier version had them."""
    assert pickle.loads(b"clopt_jax.rule\nStatistics\n.") is AccumulatorStatistics


if __name__ == "__main__":
    record()
