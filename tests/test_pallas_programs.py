"""The compiled kernels inside the programs that users write, against the XLA path in the same ones.

A kernel that changes arrays in place is right alone and wrong where XLA hands it an array that
something else still reads: in loops, branches, under wrappers, beside donated arguments. Only a GPU
shows that, so these run there and nowhere else.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import pytest
from kernels import gpu, one_device  # noqa: F401 (fixtures)

import lopt_jax

STEPS = 6
SHAPES = {
    "kernel": (512, 384),
    "bias": (384,),
    "conv": (3, 3, 64, 64),
    "layers": (4, 256, 128),
    "embedding": (1003, 68),  # in a larger array its parts begin at no multiple of 256 bytes
    "scale": (),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("gpu", "one_device")]


def draw(seed, scale, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: (scale * jax.random.normal(key, shape)).astype(dtype)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


@functools.cache
def gradients_of_steps():
    """Gradients with a leading axis of steps."""
    with jax.ensure_compile_time_eval():  # the first to ask may be a loop's body, in a trace
        return jax.tree.map(lambda *xs: jnp.stack(xs), *(draw(1 + i, 0.1) for i in range(STEPS)))


def small_fc_lopt(backend, **options):
    return lopt_jax.small_fc_lopt(backend=backend, **options)


def velo(backend, **options):
    return optimizers.make("velo", backend=backend, **options)


def at_step(i):
    return jax.tree.map(lambda x: x[i], gradients_of_steps())


def update(tx, gradients, params, state):
    updates, state = tx.update(gradients, state, params, value=jnp.float32(1.0))
    return optax.apply_updates(params, updates), state


# Ways to take the steps


def one_by_one(tx, params, donate=()):
    step = jax.jit(functools.partial(update, tx), donate_argnums=donate)
    state = jax.jit(tx.init)(params)
    params = jax.tree.map(jnp.copy, params)
    for i in range(STEPS):
        params, state = step(at_step(i), params, state)
    return params


def donated(tx, params):
    return one_by_one(tx, params, donate=(1, 2))


def scanned(tx, params):
    def step(carry, gradients):
        return update(tx, gradients, *carry), None

    run = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs)[0], donate_argnums=0)
    return run((jax.tree.map(jnp.copy, params), tx.init(params)), gradients_of_steps())[0]


def scanned_with_history(tx, params):
    """Old parameters are still read after the step that replaces them."""

    def step(carry, gradients):
        new = update(tx, gradients, *carry)
        return new, jax.tree.map(lambda old, new: new - old, carry[0], new[0])

    run = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))
    _, moves = run((params, tx.init(params)), gradients_of_steps())
    return jax.tree.map(lambda p, m: p + jnp.sum(m, 0), params, moves)


def scanned_with_all(tx, params):
    """Every turn's updates, parameters and state are kept: parts of larger arrays."""

    def step(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params, value=jnp.float32(1.0))
        carry = (optax.apply_updates(params, updates), state)
        return carry, (updates, carry)

    return by_what_is_kept(step, tx, params)


def applied_with_all(tx, params):
    """The same where new parameters are written by the kernels."""

    def step(carry, gradients):
        params, state = carry
        one = jnp.float32(1.0)
        carry = lopt_jax.update_params(tx, gradients, state, params, value=one)
        return carry, (jax.tree.map(jnp.subtract, carry[0], params), carry)

    return by_what_is_kept(step, tx, params)


def by_what_is_kept(step, tx, params):
    """The parameters after all updates that a scan keeps; what it kept last is its result."""
    run = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))
    last, (updates, carries) = run((params, tx.init(params)), gradients_of_steps())
    same = lambda x, of_turns: np.testing.assert_array_equal(of_turns[-1], x)  # noqa: E731
    jax.tree.map(same, last, carries)
    return jax.tree.map(lambda p, u: p + jnp.sum(u, 0), params, updates)


def looped(tx, params):
    def body(carry):
        i, params, state = carry
        return i + 1, *update(tx, at_step(i), params, state)

    run = jax.jit(lambda carry: jax.lax.while_loop(lambda c: c[0] < STEPS, body, carry))
    return run((0, params, tx.init(params)))[1]


def branched(tx, params):
    """Twice as many steps, every other one skipped."""

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(gradients, params, state, skip):
        take = functools.partial(update, tx, gradients)
        return jax.lax.cond(skip, lambda *same: same, take, params, state)

    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for i in range(2 * STEPS):
        params, state = step(at_step(i // 2), params, state, i % 2 == 0)
    return params


def applied(tx, params):
    """New parameters are written by the kernels."""

    def step(carry, gradients):
        params, state = carry
        one = jnp.float32(1.0)
        return lopt_jax.update_params(tx, gradients, state, params, value=one), None

    run = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs)[0], donate_argnums=0)
    return run((jax.tree.map(jnp.copy, params), tx.init(params)), gradients_of_steps())[0]


def in_one_vector(tx, params):
    """All of parameters and state are parts of few vectors, as some trainers keep them."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    state, unravel_state = jax.flatten_util.ravel_pytree(
        jax.tree.map(lambda x: x.astype(jnp.float32), tx.init(params))
    )
    dtypes = jax.tree.map(lambda x: x.dtype, jax.eval_shape(tx.init, params))

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(gradients, flat, state):
        of = jax.tree.map(lambda x, dtype: x.astype(dtype), unravel_state(state), dtypes)
        new = update(tx, gradients, unravel(flat), of)
        return tuple(
            jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float32), x))[0]
            for x in new
        )

    for i in range(STEPS):
        flat, state = step(at_step(i), flat, state)
    return unravel(flat)


def in_64_bits(tx, params):
    with jax.enable_x64(True):
        return donated(tx, params)


def offloaded(tx, params):
    """The state waits in the host's memory."""
    device = jax.devices()[0]
    here, there = (
        jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        for kind in ("device", "pinned_host")
    )

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=(here, there))
    def step(gradients, params, state):
        return update(tx, gradients, params, jax.device_put(state, here))

    params, state = jax.tree.map(jnp.copy, params), jax.device_put(tx.init(params), there)
    for i in range(STEPS):
        params, state = step(at_step(i), params, state)
    return params


def ensemble(tx, params):
    """One of three members under `jax.vmap`."""
    factors = jnp.float32([0.5, 1.0, 2.0])
    members = jax.tree.map(lambda x: jnp.stack([0.5 * x, x, 2 * x]), params)
    state = jax.vmap(tx.init)(members)

    @jax.jit
    def step(gradients, members, state):
        own = lambda f: jax.tree.map(lambda g: f * g, gradients)  # noqa: E731
        return jax.vmap(lambda f, p, s: update(tx, own(f), p, s))(factors, members, state)

    for i in range(STEPS):
        members, state = step(at_step(i), members, state)
    return jax.tree.map(lambda x: x[1], members)


WAYS = (
    one_by_one,
    donated,
    scanned,
    scanned_with_history,
    scanned_with_all,
    applied_with_all,
    looped,
    branched,
    applied,
    in_one_vector,
    in_64_bits,
    offloaded,
    ensemble,
)

# Optimizers around the optimizer


def chained(tx):
    return optax.chain(optax.clip_by_global_norm(1.0), tx, optax.add_decayed_weights(1e-3))


def every_other(tx):
    return optax.MultiSteps(tx, every_k_schedule=2)


def if_finite(tx):
    return optax.apply_if_finite(tx, max_consecutive_errors=3)


def masked(tx):
    return optax.masked(tx, {name: name != "embedding" for name in SHAPES})


def with_adam(tx):
    labels = {name: "adam" if len(shape) < 2 else "learned" for name, shape in SHAPES.items()}
    return optax.multi_transform({"adam": optax.adam(1e-3), "learned": tx}, labels)


WRAPPERS = (chained, every_other, if_finite, masked, with_adam, lopt_jax.packed)


@functools.cache
def expected(make, wrap=None, layers=0, dtype=jnp.float32):
    """Parameters after the last step, by XLA."""
    return one_by_one(transformation("xla", make, wrap, layers), draw(0, 0.1, dtype))


def transformation(backend, make, wrap=None, layers=0):
    tx = make(backend, stacked_axes={name: layers * (name == "layers") for name in SHAPES})
    return tx if wrap is None else wrap(tx)


def check(run, make, wrap=None, layers=0, dtype=jnp.float32):
    start = draw(0, 0.1, dtype)
    found = run(transformation("pallas", make, wrap, layers), start)
    assert_equal(found, expected(make, wrap, layers, dtype), start)


def assert_equal(found, expected, start):
    """Within rounding and a small part of how far the parameters moved."""
    for (path, want), got, first in zip(
        jax.tree.leaves_with_path(expected),
        jax.tree.leaves(found),
        jax.tree.leaves(start),
        strict=True,
    ):
        rounding = max(1e-6, float(jnp.finfo(first.dtype).eps))
        want, got, first = (np.float64(x) for x in (want, got, first))
        moved, largest = np.max(np.abs(want - first)), np.max(np.abs(want))
        error = np.max(np.abs(got - want))
        name = jax.tree_util.keystr(path)
        assert error <= 2e-4 * moved + rounding * largest, f"{name}: {error}, moved {moved}"


def named(*functions):
    return {"argvalues": functions, "ids": lambda function: function.__name__}


@pytest.mark.parametrize("run", **named(*WAYS))
@pytest.mark.parametrize("make", **named(small_fc_lopt, velo))
def test_way(make, run):
    check(run, make)


@pytest.mark.parametrize("run", **named(donated, scanned))
@pytest.mark.parametrize("wrap", **named(*WRAPPERS))
def test_wrapper(wrap, run):
    check(run, small_fc_lopt, wrap)


@pytest.mark.parametrize("wrap", **named(every_other, lopt_jax.packed))
def test_wrapped_velo(wrap):
    check(donated, velo, wrap)


@pytest.mark.parametrize("make", **named(small_fc_lopt, velo))
def test_layers_of_a_stack(make):
    check(scanned, make, layers=1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    check(donated, small_fc_lopt, dtype=dtype)


@pytest.mark.parametrize("make", **named(small_fc_lopt, velo))
def test_one_array_in_many_places(make):
    """Gradients that are the parameters, and leaves that are one array; all of it is changed."""
    array = draw(0, 0.1)["kernel"]

    def run(tx):
        def step(params, state):
            gradients = {"first": params["second"], "second": params["first"]}
            return lopt_jax.update_params(tx, gradients, state, params, value=jnp.float32(1.0))

        params = {"first": array, "second": array}
        params, state = jax.jit(step)(params, tx.init(params))
        donating = jax.jit(step, donate_argnums=(0, 1))
        for _ in range(STEPS):
            params, state = donating(params, state)
        return params

    start = {"first": array, "second": array}
    assert_equal(run(make("pallas")), run(make("xla")), start)


def test_weights_as_arguments():
    """`auto` takes the kernels for weights that are no constants of the program."""
    weights, start = lopt_jax.load_weights("small_fc_lopt"), draw(0, 0.1)

    @functools.partial(jax.jit, static_argnums=0)
    def step(backend, weights, gradients, params, state):
        tx = lopt_jax.small_fc_lopt(weights, backend=backend)
        return update(tx, gradients, params, state)

    def run(backend):
        params, state = start, lopt_jax.small_fc_lopt(weights).init(start)
        for i in range(STEPS):
            params, state = step(backend, weights, at_step(i), params, state)
        return params

    assert_equal(run("auto"), run("xla"), start)
    state = lopt_jax.small_fc_lopt(weights).init(start)
    lowered = step.lower("auto", weights, at_step(0), start, state).as_text()
    assert "@mosaic_gpu" in lowered


@pytest.mark.parametrize("is_compiled", [True, False])
def test_on_the_cpu_beside_a_gpu(is_compiled):
    """`auto` knows it by the default device, or by where arrays lie that have values."""
    cpu = jax.devices("cpu")[0]
    start = jax.device_put(draw(0, 0.1), cpu)
    tx = velo("auto")
    if is_compiled:
        with jax.default_device(cpu):
            updates, _ = jax.jit(functools.partial(tx.update, value=1.0))(
                start, tx.init(start), start
            )
    else:
        updates, _ = tx.update(start, tx.init(start), start, value=1.0)
    assert {x.device for x in jax.tree.leaves(updates)} == {cpu}
    start = draw(0, 0.1)
    tx = velo("xla")
    expected, _ = jax.jit(functools.partial(tx.update, value=1.0))(start, tx.init(start), start)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, 0, 1e-4 * float(jnp.max(jnp.abs(b))))


CACHED = """
import hashlib, sys
import jax, jax.numpy as jnp, lopt_jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
tx = lopt_jax.small_fc_lopt(backend="pallas")
params = {"w": jnp.linspace(-1.0, 1.0, 512 * 384).reshape(512, 384), "b": jnp.ones(384)}
state = tx.init(params)
step = jax.jit(lambda p, s: lopt_jax.update_params(tx, p, s, p), donate_argnums=(0, 1))
before = sum(hits)
for _ in range(5):
    params, state = step(params, state)
bits = b"".join(bytes(memoryview(jax.device_get(x)).cast("B")) for x in jax.tree.leaves(params))
print(hashlib.sha256(bits).hexdigest(), sum(hits) - before)
"""


def test_from_the_compilation_cache(tmp_path):
    """A second process runs what the first one compiled, to the same bits."""

    def run():
        command = [sys.executable, "-c", CACHED, str(tmp_path)]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        output = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert output.returncode == 0, output.stderr
        bits, hits = output.stdout.split()
        return bits, int(hits)

    (first, none), (second, some) = run(), run()
    assert first == second
    assert none == 0
    assert some > 0
