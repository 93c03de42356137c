"""State specs, what crosses devices, what distributed refuses, and checkpoints across meshes."""

import functools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import orbax.checkpoint as ocp
import pytest
import reference
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import lopt_jax
from lopt_jax import partition, sharding
from lopt_jax.collectives import collectives, moved_bytes
from lopt_jax.context import Tracing
from lopt_jax.optimizers.accumulation import accumulate_gradients

PARAMS = {"a": np.ones((8, 24), np.float32), "b": {"c": np.ones((16,), np.float32)}}
SPECS = {"a": P("data", "model"), "b": {"c": P("model")}}


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(sharding, "REPLICATED_ELEMENTS", 32)


def small_fc(**kwargs):
    return lopt_jax.small_fc_lopt(reference.weights("small_fc_lopt_h4", step_mult=0.01), **kwargs)


def velo(**kwargs):
    weights = reference.weights("velo", **reference.config("velo")["kwargs"])
    return lopt_jax.velo(10, weights, **kwargs)


def mesh_of(*sizes):
    return jax.make_mesh(
        sizes, ("data", "model")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes)
    )


def is_spec(x):
    return isinstance(x, P)


def test_state_specs():
    state = sharding.state_specs(velo(), PARAMS, SPECS)
    for tree in (*state.accumulators.momentum, state.accumulators.second_moment):
        assert tree == SPECS
    # (8, 24): d1 = 0, d0 = 1; the row keeps dimension 0, the column dimension 1
    assert state.accumulators.row == {"a": P(None, "data"), "b": {"c": P(None, "model")}}
    assert state.accumulators.column == {"a": P(None, "model"), "b": {"c": P()}}
    rest = jax.tree.leaves(state._replace(accumulators=None), is_leaf=is_spec)
    assert rest
    assert all(spec == P() for spec in rest)


def test_state_specs_of_stacked_axes():
    params = {"layers": np.ones((4, 8, 16), np.float32), "square": np.ones((8, 8), np.float32)}
    specs = {"layers": P("pipe", "data", "model"), "square": P("data", "model")}
    tx = small_fc(stacked_axes={"layers": 1, "square": 0})
    state = sharding.state_specs(tx, params, specs)
    assert state.accumulators.row == {"layers": P(None, "pipe", "data"), "square": P(None, "data")}
    assert state.accumulators.column == {
        "layers": P(None, "pipe", "model"),
        "square": P(None, "model"),
    }


def test_state_specs_of_chains():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.trace(0.9),
        optax.masked(small_fc(), {"a": True, "b": False}),
        optax.scale_by_schedule(lambda count: 1.0),
    )
    _, trace, masked, schedule = sharding.state_specs(tx, PARAMS, {"a": P("data"), "b": None})
    assert trace.trace == {"a": P("data"), "b": {"c": P()}}
    assert masked.inner_state.accumulators.momentum[0]["a"] == P("data")
    assert masked.inner_state.accumulators.row["a"] == P(None, "data")
    assert schedule.count == P()


def test_state_specs_of_boxes():
    box = nn.Partitioned(jnp.ones((8, 24)), names=("data", None))
    specs = sharding.state_specs(small_fc(), {"a": box}, {"a": P("data")})
    state = small_fc().init({"a": box})
    assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(state)
    assert jax.tree.leaves(specs.accumulators.row, is_leaf=is_spec) == [P(None, "data")]


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({"a": "data", "b": None}, TypeError, "param_specs.*PartitionSpec.*'data'"),
        ({"a": P()}, ValueError, "param_specs.*prefix"),
        ({"a": P(None, None, "x"), "b": P()}, ValueError, r"\['a'\].*\(8, 24\)"),
    ],
)
def test_state_specs_errors(specs, error, message):
    with pytest.raises(error, match=message):
        sharding.state_specs(small_fc(), PARAMS, specs)


def test_state_is_born_sharded():
    mesh = mesh_of(4, 2)
    shardings = sharding.state_shardings(velo(), PARAMS, SPECS, mesh)
    state = jax.jit(velo().init, out_shardings=shardings)(PARAMS)
    momentum = state.accumulators.momentum[0]["a"]
    assert momentum.sharding.shard_shape(momentum.shape) == (2, 12)
    assert state.accumulators.row["a"].sharding.shard_shape((3, 8)) == (3, 2)


def test_init_follows_concrete_params():
    mesh = mesh_of(4, 2)
    params = jax.device_put(
        PARAMS, jax.tree.map(lambda s: NamedSharding(mesh, s), SPECS, is_leaf=is_spec)
    )
    accumulators = small_fc().init(params).accumulators
    assert accumulators.second_moment["a"].sharding.spec == P("data", "model")
    assert accumulators.row["a"].sharding.spec == P(None, "data")
    assert accumulators.column["a"].sharding.spec == P(None, "model")


def one_device():
    return SingleDeviceSharding(jax.devices()[2])


def host_memory():
    return SingleDeviceSharding(jax.devices()[2], memory_kind="unpinned_host")


def mesh_of_one():
    return NamedSharding(Mesh(np.array(jax.devices()[2:3]), ("data",)), P("data"))


@pytest.mark.parametrize("place", [one_device, host_memory, mesh_of_one])
def test_state_lies_where_the_params_lie(place):
    """As that of `optax.adam`, whose moments are the params' `zeros_like`."""
    params = jax.device_put(PARAMS, place())
    where = lambda x: (x.sharding.device_set, x.sharding.memory_kind, x.committed)  # noqa: E731
    expected = jax.tree.map(where, optax.adam(1.0).init(params)[0].mu)
    for tx in (small_fc(), velo(), velo(gradient_accumulation=2)):
        state = tx.init(params)
        if hasattr(state, "inner"):
            assert jax.tree.map(where, state.gradient_sum) == expected
            state = state.inner
        assert jax.tree.map(where, state.accumulators.momentum[0]) == expected
        assert jax.tree.map(where, state.accumulators.second_moment) == expected
        assert where(state.accumulators.row["a"]) == expected["a"]
        assert where(state.accumulators.column["a"]) == expected["a"]


def test_state_of_params_without_a_place_has_none():
    accumulators = small_fc().init(jax.tree.map(jnp.asarray, PARAMS)).accumulators
    assert not any(x.committed for x in jax.tree.leaves(accumulators))


# What crosses devices


def compiled_update(tx, shapes, specs, mesh):
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    state = jax.eval_shape(tx.init, params)
    of_params = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    of_state = sharding.state_shardings(tx, params, specs, mesh)
    give = lambda tree, shardings: jax.tree.map(  # noqa: E731
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
    update = lambda g, s, p, v: tx.update(g, s, p, value=v)  # noqa: E731
    return (
        jax.jit(update, out_shardings=(of_params, of_state))
        .lower(
            give(params, of_params),
            give(state, of_state),
            give(params, of_params),
            jax.ShapeDtypeStruct((), jnp.float32),
        )
        .compile()
    )


@pytest.mark.parametrize(
    ("sizes", "specs"),
    [
        ((8,), {"w": P("data"), "t": P(None, "data"), "k": P(None, None, "data"), "b": P("data")}),
        ((4, 2), {"w": P("data", "model"), "t": P("model", "data"), "k": P(), "b": P("model")}),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        small_fc,
        pytest.param(velo, marks=pytest.mark.slow),
        pytest.param(functools.partial(optimizers.make, "nn_adam"), id="nn_adam"),
        pytest.param(
            functools.partial(optimizers.make, "rnn_mlp_lopt"),
            id="rnn_mlp_lopt",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_only_vectors_cross_devices(make, sizes, specs):
    shapes = {"w": (512, 256), "t": (256, 512), "k": (3, 3, 128, 64), "b": (512,)}
    found = collectives(compiled_update(make(), shapes, specs, mesh_of(*sizes)))
    assert found
    assert {c.kind for c in found} == {"all-reduce"}
    vectors = sum(2 * math.prod(s) // max(s) for s in shapes.values() if len(s) > 1)
    assert max(c.largest for c in found) <= max(math.prod(s) // 64 for s in shapes.values())
    statistics = 200 * len(shapes)  # numbers
    assert moved_bytes(found) <= 4 * (vectors + statistics)


@pytest.mark.parametrize("make", [small_fc, velo])
def test_layers_stay_on_their_devices(make):
    """Stacked axes that are split: what crosses devices are numbers of each tensor."""
    shapes, specs = {"layers": (8, 128, 64), "b": (8, 64)}, {"layers": P("data"), "b": P("data")}
    tx = make(stacked_axes={"layers": 1, "b": 1})
    found = collectives(compiled_update(tx, shapes, specs, mesh_of(8)))
    assert {c.kind for c in found} <= {"all-reduce"}
    assert sum(c.largest for c in found) <= 16 * 10  # of sixteen tensors
    assert bool(found) == (make is velo)


def test_distributed_moves_gradients_and_updates_once(monkeypatch):
    """A reduce-scatter, an all-gather, the mean of what stays whole, and FSDP's statistics."""
    monkeypatch.setattr(sharding, "REPLICATED_ELEMENTS", 64)
    shapes = {"w": (64, 96), "t": (40, 72), "b": (128,), "small": (5, 7)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    mesh = mesh_of(8)
    tx = sharding.distributed(small_fc(), "data")
    specs = sharding.distributed_specs(small_fc(), params, "data", 8)
    wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    step = wrap(tx.update, in_specs=(P(), specs, P()), out_specs=(P(), specs))
    state = jax.eval_shape(small_fc().init, params)
    found = collectives(jax.jit(step).lower(params, state, params).compile())
    split = 4 * sum(math.prod(s) for k, s in shapes.items() if k != "small")
    of_params = {"w": P("data"), "t": P("data"), "b": P("data"), "small": P()}
    statistics = moved_bytes(collectives(compiled_update(small_fc(), shapes, of_params, mesh)))
    assert moved_bytes(found, "reduce-scatter") == split
    assert moved_bytes(found, "all-gather") == split
    assert moved_bytes(found, "all-reduce") == 4 * 5 * 7 + statistics


def test_collectives_in_loops():
    mesh = mesh_of(8)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def f(x):
        body = lambda _, total: total + jax.lax.psum(x * total[0], "data")  # noqa: E731
        return jax.lax.fori_loop(0, 5, body, jax.lax.psum(x, "data"))

    found = collectives(f.lower(jnp.ones((8 * 16,))).compile())
    assert sorted((c.kind, c.bytes, c.times) for c in found) == [
        ("all-reduce", 64, 1),
        ("all-reduce", 64, 5),
    ]


# Differentiation and batching


@pytest.mark.slow
def test_gradient_and_vmap_of_the_update():
    """As meta-training does: through the update, and over several trainings at once."""
    weights = reference.weights("small_fc_lopt_h4", step_mult=0.01)
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)}

    def outcome(theta, gradient):
        tx = lopt_jax.small_fc_lopt(lopt_jax.Weights(weights.architecture, weights.config, theta))
        updates, _ = tx.update({"w": gradient}, tx.init(params), params)
        return jnp.sum(jnp.square(params["w"] + 1000 * updates["w"]))

    gradients = jnp.stack([params["w"] * 0.1, params["w"] ** 2])
    each = [jax.grad(outcome)(weights.params, g) for g in gradients]
    batched = jax.vmap(jax.grad(outcome), in_axes=(None, 0))(weights.params, gradients)
    summed = jax.grad(lambda t: jnp.sum(jax.vmap(outcome, in_axes=(None, 0))(t, gradients)))(
        weights.params
    )
    for leaf, one, two, total in zip(
        *map(jax.tree.leaves, (batched, each[0], each[1], summed)), strict=True
    ):
        scale = np.max(np.abs(one)) + np.max(np.abs(two)) + 1e-6
        np.testing.assert_allclose(leaf, np.stack([one, two]), atol=1e-4 * scale)
        np.testing.assert_allclose(total, one + two, atol=1e-4 * scale)
    assert max(float(np.max(np.abs(x))) for x in jax.tree.leaves(summed)) > 0


# distributed: what it takes and what it refuses


def run_distributed(inner, params, gradients, steps=1, check_vma=True, **kwargs):
    mesh = mesh_of(8)
    tx = sharding.distributed(inner, "data", **kwargs)
    specs = sharding.distributed_specs(inner, params, "data", 8, **kwargs)
    wrap = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    state = jax.jit(wrap(tx.init, in_specs=P(), out_specs=specs))(params)

    @jax.jit
    @functools.partial(wrap, in_specs=(P("data"), specs, P()), out_specs=(P(), specs))
    def step(gradients, state, params):
        gradients = jax.tree.map(lambda g: g[0], gradients)
        return tx.update(gradients, state, params, value=jnp.float32(1.0))

    for _ in range(steps):
        updates, state = step(gradients, state, params)
    return updates, state


def test_distributed_chain(small_limits):
    """Clipping by the global norm, a mask, momentum and accumulation around the rule."""
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((8, 24)), "c": rng.standard_normal((3, 5))}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    parts = {k: rng.standard_normal((8, *x.shape)).astype(np.float32) for k, x in params.items()}
    mean = {k: np.mean(x, 0) for k, x in parts.items()}

    def chain(clip):
        rules = optax.multi_transform(
            {"lopt": small_fc(), "adam": optax.adam(1e-3)}, {"a": "lopt", "c": "adam"}
        )
        return optax.chain(
            clip(0.5),
            optax.MultiSteps(rules, every_k_schedule=2).gradient_transformation(),
            optax.scale_by_schedule(optax.constant_schedule(0.5)),
        )

    tx = chain(optax.clip_by_global_norm)
    state = tx.init(params)
    for _ in range(2):
        expected, state = tx.update(mean, state, params)
    updates, _ = run_distributed(chain(sharding.clip_by_global_norm), params, parts, steps=2)
    for key, want in expected.items():
        scale = np.max(np.abs(want))
        assert scale > 0
        np.testing.assert_allclose(updates[key], want, atol=2e-6 * scale)


def test_distributed_passes_over_what_has_no_gradient():
    """Frozen parameters, PRNG keys and integers, as the optimizer does alone."""
    params = {"w": jnp.ones((8, 4)), "frozen": jnp.ones((8, 4)), "count": jnp.arange(3)}
    params |= {"key": jax.random.key(0)}
    gradients = {"w": params["w"], "frozen": None, "key": None}
    gradients["count"] = np.zeros((3,), jax.dtypes.float0)
    tx = sharding.distributed(small_fc(), "data")
    run = jax.shard_map(
        lambda p, g: tx.update(g, tx.init(p), p)[0],
        mesh=mesh_of(8),
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    updates = jax.eval_shape(run, params, gradients)
    assert {name for name, update in updates.items() if update is not None} == {"w"}


def test_distributed_refuses_what_shards_would_make_wrong():
    tx = optax.chain(optax.clip_by_global_norm(1.0), small_fc())
    with pytest.raises(NotImplementedError, match=r"reduce_sum.*clip_by_global_norm"):
        run_distributed(tx, {"a": np.ones((3, 4), np.float32)}, {"a": np.ones((8, 3, 4))})


@pytest.mark.parametrize(
    ("primitive", "function"),
    [
        ("slice", lambda x: jnp.roll(x, 1, axis=0)),
        ("rev", lambda x: x[::-1]),
        ("cumlogsumexp", lambda x: jax.lax.cumlogsumexp(x)),
        ("fft", lambda x: jnp.fft.fft(x).real),
    ],
)
def test_distributed_refuses_what_moves_elements(primitive, function):
    first = optax.stateless(lambda updates, params: jax.tree.map(function, updates))
    with pytest.raises(NotImplementedError, match=primitive):
        run_distributed(
            optax.chain(first, small_fc()),
            {"a": np.ones((3, 4), np.float32)},
            {"a": np.ones((8, 3, 4), np.float32)},
        )


def test_distributed_refuses_what_a_wrapper_kept_from_knowing_of_shards(small_limits):
    """Taken for whole tensors, shards would be updated wrongly without a word."""
    tx, params = small_fc(), {"a": np.ones((8, 24), np.float32)}
    treedef = jax.tree.structure(jax.eval_shape(tx.init, params))

    def update(updates, state, params):  # of arrays alone, whatever else a state says
        new, state = tx.update(updates, treedef.unflatten(jax.tree.leaves(state)), params)
        return new, state

    clip = optax.chain(sharding.clip_by_global_norm(1.0), tx)
    lossy = optax.GradientTransformation(clip.init, lambda *trees: clip.update(*trees))
    gradients = {"a": np.ones((8, 8, 24), np.float32)}
    for unaware in (optax.GradientTransformation(tx.init, update), lossy):
        with pytest.raises(NotImplementedError, match="loses extra arguments"):
            run_distributed(unaware, params, gradients)


def test_distributed_refuses_stacked_axes_it_was_not_told_of(small_limits):
    params = {"layers": np.ones((8, 4, 4), np.float32)}
    parts = {"layers": np.ones((8, 8, 4, 4), np.float32)}
    with pytest.raises(ValueError, match="stacked_axes"):
        run_distributed(small_fc(stacked_axes=1), params, parts)


def test_distributed_stacked_axes(small_limits):
    rng = np.random.default_rng(0)
    params = {"layers": rng.standard_normal((3, 4, 8)).astype(np.float32)}
    parts = {"layers": rng.standard_normal((8, 3, 4, 8)).astype(np.float32)}
    tx = small_fc(stacked_axes=1)
    expected, _ = tx.update({"layers": parts["layers"].mean(0)}, tx.init(params), params)
    updates, _ = run_distributed(tx, params, parts, stacked_axes=1)
    scale = np.max(np.abs(expected["layers"]))
    np.testing.assert_allclose(updates["layers"], expected["layers"], atol=2e-6 * scale)


@pytest.mark.slow
def test_distributed_velo_with_accumulation(small_limits):
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((8, 6)).astype(np.float32)}
    parts = {"w": rng.standard_normal((8, 8, 6)).astype(np.float32)}
    tx = accumulate_gradients(velo(), 2)
    state = tx.init(params)
    for _ in range(2):
        expected, state = tx.update({"w": parts["w"].mean(0)}, state, params, value=1.0)
    updates, _ = run_distributed(tx, params, parts, steps=2)
    np.testing.assert_allclose(
        updates["w"], expected["w"], atol=2e-6 * np.max(np.abs(expected["w"]))
    )


# What cannot be handled efficiently is said, once, with the leaf's name


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """Calls a function twice; the message of the only warning that it may give."""
    monkeypatch.setattr(partition, "_said", set())

    def run(function):
        with caplog.at_level(logging.WARNING, logger="lopt_jax"):
            results = [function() for _ in range(2)]
        (record,) = (x for x in caplog.records if x.name != "lopt_jax.weights.convert")
        return results[-1], record.message

    return run


def test_a_leaf_that_does_not_split_is_named_once(warnings_of):
    params = {"layer": {"kernel": jax.ShapeDtypeStruct((5, 3, 5, 3, 5, 3, 5), jnp.float32)}}
    plan = lambda: sharding.distributed_specs(small_fc(), params, "data", 8)  # noqa: E731
    specs, message = warnings_of(plan)
    assert specs.accumulators.momentum[0]["layer"]["kernel"] == P(*[None] * 7)
    assert "['layer']['kernel']" in message
    assert "every device keeps" in message


def test_a_leaf_that_moves_at_every_step_is_named_once(warnings_of):
    """Parameters and state that are split along different dimensions."""
    mesh, tx = mesh_of(8), small_fc()
    params = {"layer": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), "f4")}}
    shardings = sharding.state_shardings(tx, params, P("data"), mesh)
    placed = jax.device_put(params, NamedSharding(mesh, P(None, "data")))

    def run():
        state = jax.jit(tx.init, out_shardings=shardings)(placed)
        return jax.jit(lambda g, s, p: tx.update(g, s, p)[0])(placed, state, placed)

    updates, message = warnings_of(run)
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    want = expected["layer"]["kernel"]
    np.testing.assert_allclose(updates["layer"]["kernel"], want, atol=2e-6 * np.max(np.abs(want)))
    assert "['layer']['kernel']" in message
    assert "is moved at every step" in message


def test_gradients_that_are_summed_already(warnings_of, small_limits):
    """By `jax.grad` inside a `shard_map` that checks types: they are taken as they are, once."""
    mesh, tx = mesh_of(8), small_fc()
    rng = np.random.default_rng(0)
    params, x = (rng.standard_normal(shape, np.float32) for shape in ((24, 16), (64, 24)))
    specs = sharding.distributed_specs(tx, params, "data", 8)
    loss = lambda params, x: jnp.mean(jnp.square(x @ params))  # noqa: E731

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=P())
    def step(params, state, x):
        gradients = jax.grad(lambda params: jax.lax.pmean(loss(params, x), "data"))(params)
        return sharding.distributed(tx, "data").update(gradients, state, params)[0]

    updates, message = warnings_of(lambda: jax.jit(step)(params, tx.init(params), x))
    expected, _ = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
    np.testing.assert_allclose(updates, expected, atol=4e-6 * np.max(np.abs(expected)))
    assert "summed over devices already" in message


def test_a_leaf_that_kernels_cannot_split_is_named_once(warnings_of, small_limits):
    """Padded shards: XLA has them also where the kernels are asked for."""
    mosaic_gpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    params = {"layer": {"kernel": np.ones((23, 13), np.float32)}}
    parts = {"layer": {"kernel": np.ones((8, 23, 13), np.float32)}}

    def run():
        with mosaic_gpu.force_gpu_interpret_mode():
            return run_distributed(small_fc(backend="pallas"), params, parts, check_vma=False)

    _, message = warnings_of(run)
    assert "['layer']['kernel']" in message
    assert "XLA updates its shards" in message


# Checkpoints


def test_orbax_across_meshes(tmp_path):
    """Saved from a mesh of eight, restored onto one of another shape and onto one device."""
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((8, 24)).astype(np.float32)}
    specs = {"a": P("data", "model")}
    tx = velo()
    mesh = mesh_of(4, 2)
    of_params = {"a": NamedSharding(mesh, specs["a"])}
    state = jax.jit(tx.init, out_shardings=sharding.state_shardings(tx, params, specs, mesh))(
        params
    )
    placed = jax.device_put(params, of_params)
    _, state = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))(placed, state, placed)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    shapes = jax.eval_shape(tx.init, params)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    targets = [
        sharding.state_shardings(tx, params, specs, mesh_of(2, 4)),
        sharding.state_shardings(tx, params, {"a": P(None, "model")}, mesh_of(1, 8)),
        jax.tree.map(lambda _: one, shapes),
    ]
    for shardings in targets:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "state", abstract)
        for before, after, sharding_ in zip(
            *map(jax.tree.leaves, (state, restored, shardings)), strict=True
        ):
            np.testing.assert_array_equal(before, after)
            assert after.sharding.is_equivalent_to(sharding_, after.ndim)


def test_functions_with_constants_split():
    """The partitioner's operation takes no constants; kernels have some."""
    mesh = mesh_of(8)
    x = jax.device_put(jnp.arange(32.0).reshape(1, 16, 2), NamedSharding(mesh, P(None, "data")))
    weights = np.asarray([1.0, 2.0], np.float32)

    def function(tracing, hows, x):
        (how,) = hows
        total = jnp.sum(x * jnp.asarray(weights), axis=(1, 2))
        return total if how is None else how.total(total, (0, 1))

    dims = partition.Dims((None, 0, 1))
    result = lambda _: partition.Dims((None,))  # noqa: E731
    run = jax.jit(
        lambda x: partition.spread(
            function, (x,), (dims,), result, [(16, 2)], [None], [(0,)], ["x"], Tracing()
        )
    )
    np.testing.assert_allclose(run(x), [float(np.sum(np.arange(32).reshape(16, 2) * weights))])


@pytest.mark.parametrize("sizes", [(8,), (2, 4)])
def test_bytes_of_gathers_and_scatters(sizes):
    """The size of the whole array, whatever the mesh and XLA's way to write its groups."""
    mesh = mesh_of(*sizes)
    names = mesh.axis_names

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def f(x):
        part = jax.lax.psum_scatter(x, names[-1], tiled=True)
        return jax.lax.all_gather(2 * part, names[-1], tiled=True)

    found = collectives(f.lower(jnp.ones((64, 3))).compile())
    assert sorted((c.kind, c.bytes) for c in found) == [
        ("all-gather", 64 * 3 * 4),
        ("reduce-scatter", 64 * 3 * 4),
    ]


def test_reading_other_notations():
    text = """
HloModule m
ENTRY %main (p: f32[8]) -> f32[4] {
  %a = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
  %b = f32[4]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %c = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups={{0,1}}, dimensions={0}
  %d = f32[8]{0} all-gather-done(%c)
}
"""
    assert [(c.kind, c.bytes) for c in collectives(text)] == [
        ("reduce-scatter", 32),
        ("reduce-scatter", 32),
        ("all-gather", 32),
    ]


# What is not finite


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_leave_a_bad_step_out_together(check_vma, small_limits):
    """One device's gradient is not finite, of a leaf that is split and of one that is whole."""
    tx = sharding.apply_if_finite(optax.trace(0.9), max_consecutive_errors=2)
    params = {"split": np.ones((8, 8), np.float32), "whole": np.ones((3,), np.float32)}
    good = {k: np.ones((8, *x.shape), np.float32) for k, x in params.items()}
    run = functools.partial(run_distributed, tx, params, check_vma=check_vma)
    for key in params:
        bad = {k: x.copy() for k, x in good.items()}
        bad[key][3].flat[0] = np.inf
        updates, state = run(bad)
        for update in jax.tree.leaves((updates, state.inner_state)):
            np.testing.assert_array_equal(update, np.zeros_like(update))
        assert (int(state.total_notfinite), bool(state.last_finite)) == (1, False)
    updates, state = run(good)
    np.testing.assert_array_equal(updates["split"], params["split"])
    assert (int(state.total_notfinite), bool(state.last_finite)) == (0, True)


def test_distributed_refuses_the_function_of_optax_that_would_deadlock():
    tx = optax.apply_if_finite(optax.sgd(1.0), 3)
    with pytest.raises(NotImplementedError, match=r"reduce_and.*sharding\.apply_if_finite"):
        run_distributed(tx, {"a": np.ones((3, 4), np.float32)}, {"a": np.ones((8, 3, 4))})


def test_distributed_compares_shapes(small_limits):
    for shape in ((8, 1, 8), (8, 8)):
        with pytest.raises(ValueError, match=r"updates: expected the shape of the param \['w'\]"):
            run_distributed(small_fc(), {"w": np.ones((8, 8))}, {"w": np.ones(shape)})
