"""Leaves of more than 2^31 elements: shapes alone, no memory, and small limits in their place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest
from jax.sharding import PartitionSpec as P

from lopt_jax import batches, sharding
from lopt_jax.accumulators import Accumulators
from lopt_jax.compiler.slices import opaque_zero, part_taker
from lopt_jax.context import Tracing
from lopt_jax.partition import Partition
from lopt_jax.rules.rule import TensorArrays, TensorUpdate
from lopt_jax.tensors import init_accumulators, tensors_of
from lopt_jax.xla import blocks

SHAPES = {
    "matrix": (65_536, 40_000),
    "vector": (3_000_000_000,),
    "conv": (3, 3, 20_000, 16_384),
    "long": (2, 3_000_000_000),
    "scales": (40_000, 65_536),
    "shifts": (40_000, 65_536),
}


def update_of_shapes(tx, *keys):
    """Traces one update of leaves of such shapes."""
    shapes = {key: SHAPES[key] for key in keys}
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    state = jax.eval_shape(tx.init, params)
    step = lambda g, state, p: tx.update(g, state, p, value=jnp.float32(1))  # noqa: E731
    updates, new_state = jax.eval_shape(step, params, state, params)
    assert jax.tree.map(lambda x: x.shape, updates) == shapes
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_on_xla(name):
    update_of_shapes(optimizers.make(name, backend="xla"), "matrix", "vector")


def test_other_ranks():
    update_of_shapes(optimizers.make("small_fc_lopt", backend="xla"), "conv", "long")


def test_stacks_whose_vectors_are_joined():
    tx = optimizers.make("small_fc_lopt", backend="xla", stacked_axes=1)
    update_of_shapes(tx, "scales", "shifts")


def test_kernels(monkeypatch):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from pallas_kernels import choice, supports

    monkeypatch.setattr(supports, "unsupported_reason", lambda *_, **__: None)
    tx = optimizers.make("small_fc_lopt", backend="pallas")
    update_of_shapes(tx, "matrix")
    with pytest.raises(NotImplementedError, match="longer than 32 bits count"):
        update_of_shapes(tx, "long")
    # what no int32 counts in a kernel: elements along an axis, and lines of many small matrices
    assert choice.largest_index((1, *SHAPES["long"])) > 1 << 31
    assert choice.largest_index((1 << 26, 8, 8)) > 1 << 31
    assert choice.largest_index((1, *SHAPES["vector"])) < 1 << 31


def test_distributed():
    """A dimension of which a device holds less than 2^31, and some of which is padding."""
    axis = "data"
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((jax.device_count(),), (axis,), axis_types=(kind,))
    tx = sharding.distributed(optimizers.make("small_fc_lopt"), axis)
    params = {"vector": jax.ShapeDtypeStruct((3_000_000_001,), jnp.float32)}

    def step(gradients, params):
        return tx.update(gradients, tx.init(params), params)[0]

    run = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    assert jax.eval_shape(run, params, params)["vector"].shape == (3_000_000_001,)


def test_parts_are_counted_by_their_number():
    """No place in a dimension of 3e9 elements is computed on a device."""
    axis = "data"
    mesh = jax.sharding.AbstractMesh((2,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))
    partition = Partition((3_000_000_000,), ((axis,),))
    whole = jax.ShapeDtypeStruct((3_000_000_000,), jnp.float32)

    def there_and_back(x):
        return partition.own_part(partition.shard(x), (axis,))

    run = jax.shard_map(there_and_back, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    program = str(jax.make_jaxpr(run)(whole))
    assert "1500000000" in program
    assert set(re.findall(r" mul \S+ (\S+)", program)) <= {"1:i32[]"}  # of the device's number


@pytest.mark.parametrize("shape", [(23,), (23, 2), (3, 29)])
def test_ranges_of_blocks(shape, monkeypatch):
    """A prime number of elements along an axis, of which an index would hold few."""
    monkeypatch.setattr(blocks, "LARGEST_INDEX", 7)
    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    y = jnp.arange(float(shape[-1])).reshape((*(1 for _ in shape[1:]), -1))
    got = blocks.map_blocks(lambda x, y: jnp.square(x) + y, (x, y), shape, 2)
    np.testing.assert_array_equal(got, np.square(x) + y)


def test_joined_leaves_keep_the_axis_of_tensors(monkeypatch):
    """Where places along the joined axis would be too large, parts are taken by tensor."""
    params = {"a": jnp.ones((2, 6)), "b": jnp.full((3, 6), 2.0)}
    gradients = jax.tree.leaves(optimizers.random_like(params, seed=0))
    dtypes = Accumulators(
        momentum=("float32",), second_moment="float32", row="float32", column="float32"
    )
    like = init_accumulators(params, dtypes, 1, stacked_axes=1)
    by_leaf = [
        jax.tree.map(lambda x, k=k: x[k], like, is_leaf=lambda x: isinstance(x, dict)) for k in "ab"
    ]
    leaves = [TensorArrays(*pair) for pair in zip(gradients, gradients, by_leaf, strict=True)]
    tensors = tensors_of(params, 1)
    (group,) = batches.make_groups(tensors, gradients, gradients, ["a", "b"])
    inputs = batches.gather(group, tensors, leaves)
    for limit in (7, 1 << 20):
        monkeypatch.setattr(batches, "LARGEST_INDEX", limit)
        taker = part_taker(opaque_zero(Tracing(), inputs.gradient))
        result = TensorUpdate(inputs.gradient, inputs.accumulators, None)
        parts = batches.scatter(group, tensors, result, leaves, taker, taker)
        for part, leaf in zip(parts, leaves, strict=True):
            np.testing.assert_array_equal(part.update, leaf.gradient)
            jax.tree.map(np.testing.assert_array_equal, part.accumulators, leaf.accumulators)
