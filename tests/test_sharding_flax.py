"""Flax's names of axes, linen's and NNX's, in the optimizer's state under a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

KERNEL = (32, 9)  # its row is (9,), its column (32,): nine does not split
RULES = (("in", "model"), ("out", None))


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def linear(**metadata):
    """A layer whose kernel says in its metadata how it is split."""
    init = nnx.initializers.lecun_normal()
    return nnx.Linear(*KERNEL, kernel_init=nnx.with_metadata(init, **metadata), rngs=nnx.Rngs(0))


def optimizer_of(name, **metadata):
    return nnx.Optimizer(linear(**metadata), optimizers.plain(name), wrt=nnx.Param)


def variables(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_state_of_nnx_optimizer(name):
    """Arrays like the kernel are split as it is; others only along axes that are the kernel's."""
    with jax.set_mesh(mesh_of()):
        state = optimizer_of(name, out_sharding=("model", None)).opt_state
    splits = {KERNEL: P("model", None), (3, 32): P(None, "model")}
    for x in variables(state):
        array = x.get_value()
        names = x.get_metadata("out_sharding", None)
        assert names is None or len(names) == array.ndim
        spec = splits.get(array.shape, P())
        expected = NamedSharding(mesh_of(), spec)
        assert array.sharding.is_equivalent_to(expected, array.ndim), (array.shape, names)
    like_kernel = sum(x.get_value().shape == KERNEL for x in variables(state))
    # the linear rule of lopt keeps the momentum of a matrix alone
    averages = 1 if name == "lopt" else len(optimizers.averages(optimizers.plain(name).init({})))
    assert like_kernel >= averages


@pytest.mark.parametrize(
    "metadata",
    [
        {"out_sharding": P("model")},
        {"out_sharding": P("model", None), "kind": AxisType.Explicit},
        {"out_sharding": NamedSharding(mesh_of(), P("model")), "without": True},
        {"out_sharding": ("model", None), "mesh": mesh_of(), "without": True},
        {"out_sharding": ("in", "out"), "sharding_rules": RULES},
        {"out_sharding": (None, None), "optimizer_sharding": ("model", None)},
    ],
    ids=lambda metadata: "-".join(map(str, metadata.values())),
)
def test_each_way_to_name_axes(metadata):
    metadata = dict(metadata)
    mesh = mesh_of(metadata.pop("kind", AxisType.Auto))
    if metadata.pop("without", False):
        found = optimizer_of("small_fc_lopt", **metadata).opt_state.accumulators
    else:
        with jax.set_mesh(mesh):
            found = optimizer_of("small_fc_lopt", **metadata).opt_state.accumulators
    for tree, spec in (
        (found.momentum[0], P("model", None)),
        (found.second_moment, P("model", None)),
        (found.row, P()),
        (found.column, P(None, "model")),
    ):
        array = tree["kernel"].get_value()
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


def test_checkpoint_of_nnx_optimizer(tmp_path):
    with jax.set_mesh(mesh_of()):
        state = nnx.state(optimizer_of("small_fc_lopt", out_sharding=("model", None)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["small_fc_lopt", "celo2"])
def test_logical_names_of_linen(name):
    """As Flax's guide does it: abstract state, its specs, `jit` with them."""
    model = nn.Dense(
        KERNEL[1], kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("in", "out"))
    )
    tx, mesh = optimizers.plain(name), mesh_of()

    def init():
        return tx.init(model.init(jax.random.key(0), jnp.ones((1, KERNEL[0])))["params"])

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        specs = nn.get_partition_spec(jax.eval_shape(init))
        shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
        state = jax.jit(init, out_shardings=shardings)()
        assert specs == nn.get_partition_spec(init())
    assert specs.accumulators.row["kernel"] == P(None, "out")
    assert specs.accumulators.column["kernel"] == P(None, "in")
    column = state.accumulators.column["kernel"].value
    assert column.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)
