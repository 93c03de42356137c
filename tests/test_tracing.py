"""What steers a trace is part of the key under which it is kept."""

import gc
import re
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest

import lopt_jax
from lopt_jax import backends, context, xla

PARAMS = {
    **{f"bias_{i}": jnp.linspace(-1.0, 1.0, 6) for i in range(3)},
    "kernel": jnp.linspace(-1.0, 1.0, 40).reshape(5, 8),
}


def small_fc_lopt():
    return optimizers.make("small_fc_lopt", backend="xla")


def program(tx, **options):
    """The program of an update, without the names of its variables."""
    update = lambda *trees: tx.update(*trees, **options)  # noqa: E731
    text = str(jax.make_jaxpr(update)(PARAMS, tx.init(PARAMS), PARAMS))
    return sorted(re.findall(r"= (\w+)", text))


def as_it_is(tx):
    return program(tx)


def packed(tx):
    return program(lopt_jax.packed(tx))


def in_a_batch(tx):
    with backends.batch(8):
        return program(tx)


def on_another_device(tx):
    with context.steering(device="cpu"):
        return program(tx)


@pytest.mark.parametrize("ways", [(as_it_is, packed), (packed, as_it_is), (as_it_is, in_a_batch)])
def test_one_transformation_is_traced_anew_for_each_way(ways, monkeypatch):
    """As if each had a transformation of its own: which was traced first makes no difference."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # whose programs differ by batch
    alone = [way(small_fc_lopt()) for way in ways]
    assert alone[0] != alone[1]
    tx = small_fc_lopt()
    assert [way(tx) for way in ways] == alone


def test_a_default_device_is_part_of_the_key(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    alone = as_it_is(small_fc_lopt()), on_another_device(small_fc_lopt())
    tx = small_fc_lopt()
    assert (as_it_is(tx), on_another_device(tx)) == alone


def test_equal_optimizers_share_traces():
    program(small_fc_lopt())
    caches = xla._passes, xla._first_pass
    before = [cache.cache_info() for cache in caches]
    program(small_fc_lopt())
    for old, new in zip(before, [cache.cache_info() for cache in caches], strict=True):
        assert new.misses == old.misses
        assert new.hits > old.hits
    program(optimizers.make("small_fc_lopt", backend="xla", precision="default"))
    assert xla._passes.cache_info().misses == before[0].misses + 1


def test_no_cache_keeps_an_optimizer():
    class Array(np.ndarray):
        """One that can be watched."""

    weights = optimizers.weights("small_fc_lopt")
    params = jax.tree.map(lambda x: np.array(x).view(Array), weights.params)
    own = lopt_jax.Weights(weights.architecture, weights.config, params)
    tx = lopt_jax.small_fc_lopt(own, backend="xla")
    jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)
    watched = [weakref.ref(tx.update), *map(weakref.ref, jax.tree.leaves(own.params))]
    del own, tx, params
    gc.collect()
    assert not any(ref() is not None for ref in watched)


@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
def test_kernels_are_cut_for_the_device(multiprocessors, monkeypatch):
    """Whole waves of programs on GPUs of any size."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from pallas_kernels import tuning

    gpu = types.SimpleNamespace(platform="gpu", core_count=multiprocessors)
    monkeypatch.setattr(context, "device", lambda: gpu)
    for chosen in (tuning.FIRST, tuning.SUMS, tuning.UPDATE):
        view = tuning.view_for((4096, 4096), chosen)
        programs = tuning.plan_for((view,), 1, chosen).programs
        waves = programs / (multiprocessors * chosen.programs)
        assert 0.9 < waves / np.ceil(waves) <= 1
