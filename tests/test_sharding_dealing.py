"""Matrices dealt out over devices: one device's results, each computed once, moved twice."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax.dealing import dealt
from lopt_jax.partition import Partition
from lopt_jax.rules.newton_schulz import newton_schulz, operations

MESH = {"data": 4, "model": 2}
LAYOUTS = {
    "replicated": lambda name: P(),
    "fsdp": lambda name: P(None, ("data", "model")),
    "tensor": lambda name: P(None, "data", "model"),
}
SHAPES = {"up": (8, 16, 64), "down": (8, 64, 16), "square": (3, 32, 32)}  # stacked layers


def mesh_of(kind):
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind,) * 2)


def trees():
    keys = jax.random.split(jax.random.key(0), 2 * len(SHAPES))
    make = lambda keys: {  # noqa: E731
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return make(keys[: len(SHAPES)]), make(keys[len(SHAPES) :])


def optimizer(precision="highest"):
    return lopt_jax.lopt(
        100, stacked_axes=1, precision=precision, label_fn=lambda path, leaf: "matrix"
    )


def update(tx, gradients, params):
    return tx.update(gradients, tx.init(params), params)[0]


@functools.cache
def on_one_device():
    params, gradients = jax.device_put(trees(), jax.devices()[0])
    return jax.tree.map(
        np.asarray, jax.jit(functools.partial(update, optimizer()))(gradients, params)
    )


def placed(mesh, layout):
    return [
        {
            name: {"kernel": jax.device_put(leaf["kernel"], NamedSharding(mesh, layout(name)))}
            for name, leaf in tree.items()
        }
        for tree in trees()
    ]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_one_devices(kind, layout):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, gradients = placed(mesh, LAYOUTS[layout])
        got = jax.jit(functools.partial(update, optimizer()))(gradients, params)
    for name in SHAPES:
        expected = on_one_device()[name]["kernel"]
        bound = 2e-6 * np.abs(expected).max()
        np.testing.assert_allclose(got[name]["kernel"], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 5, 8, 11])
def test_dealt_in_shard_map(layout, count):
    """Of any number of tensors, padded ones included, and of devices that hold copies."""
    mesh = mesh_of(AxisType.Explicit)
    shape = (16, 24)
    spec = LAYOUTS[layout]("")
    entries = [*spec, None, None][1:3]
    names = tuple(x if isinstance(x, tuple) else (x,) * (x is not None) for x in entries)
    x = jax.random.normal(jax.random.key(1), (count, *shape))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def run(shards):
        return dealt(newton_schulz, shards, Partition(shape, names), tuple(MESH), shards.dtype)

    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(got, newton_schulz(x), rtol=0, atol=2e-6)


def test_dealt_where_parts_are_padded():
    """A dimension that the devices do not divide: the last of them hold padding."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(1), (3, 10, 7))
    wide = jnp.pad(x, ((0, 0), (0, 2), (0, 0)), constant_values=9.0)
    partition = Partition((10, 7), (("data",), ()))
    spec = P(None, "data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def run(shards):
        return dealt(newton_schulz, shards, partition, ("data",), shards.dtype)

    np.testing.assert_allclose(run(wide)[:, :10], newton_schulz(x), rtol=0, atol=2e-6)


# -- what it costs ---------------------------------------------------------------------------------


def compiled(layout, precision):
    mesh = mesh_of(AxisType.Auto)
    params, gradients = placed(mesh, LAYOUTS[layout])
    step = jax.jit(functools.partial(update, optimizer(precision)))
    return step.lower(gradients, params).compile()


def products(text):
    """Multiplications of the products of matrices that one device makes, of the rule's own none."""
    shapes = dict(re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text))
    sizes_of = lambda shape: [int(n) for n in shape.split(",")]  # noqa: E731
    sides = {side for _, *shape in SHAPES.values() for side in shape}
    total = 0
    for line in text.splitlines():
        found = re.search(r"= \w+\[([\d,]+)\]\S* dot\((%[\w.-]+)", line)
        if found and set(sizes_of(found[1])[-2:]) <= sides:
            contracted = re.search(r"lhs_contracting_dims={(\d+)}", line)
            length = sizes_of(shapes[found[2]])[int(contracted[1])]
            total += int(np.prod(sizes_of(found[1]))) * length
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_matrix_is_iterated_once(layout):
    """All devices together make one device's products, but for five squares of padding."""
    iterated = lambda count, *shape: count * operations(*sorted(shape), (1,) * 5)  # noqa: E731
    expected = sum(iterated(*shape) for shape in SHAPES.values()) + iterated(5, 32, 32)
    assert 8 * products(compiled(layout, "highest").as_text()) == expected


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_every_matrix_moves_there_and_back_once(layout):
    text = compiled(layout, "highest").as_text()
    moved = 0
    for pieces in re.findall(r"= \((.*)\) all-to-all\(", text):
        shapes = re.findall(r"f32\[([\d,]+)\]", pieces)
        moved += sum(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
    elements = sum(int(np.prod(shape)) for shape in SHAPES.values()) + 5 * 32 * 32
    assert 8 * moved == 2 * elements


def test_what_moves_is_of_half_width():
    """Where products are of bfloat16, arrays travel in it."""
    mesh = mesh_of(AxisType.Auto)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(None, "data"), out_specs=P(None, "data")
    )
    def run(shards):
        partition = Partition((16, 24), (("data",), ()))
        return dealt(newton_schulz, shards, partition, tuple(MESH), jnp.bfloat16)

    program = str(jax.make_jaxpr(run)(jnp.zeros((8, 16, 24))))
    moved = re.findall(r"(\w+)\[[\d,]+\]\S* = (?:all_to_all|all_gather)", program)
    assert moved == ["bf16"] * 3  # there, to the devices that hold copies, and back
