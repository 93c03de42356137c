"""Several processes: training over two, and examples that are killed and started again."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optimizers
import orbax.checkpoint as ocp
import pytest

import lopt_jax

ROOT = Path(__file__).parents[1]

WORKER = """
import sys

sys.path[:0] = [{tests!r}, {root!r}]
import jax

process, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if process >= 0:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{{port}}", num_processes=2, process_id=process)
else:
    jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lopt_jax import sharding

assert len(jax.devices()) == 2
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
tx = optimizers.make({name!r})
rng = np.random.default_rng(0)
params = {{"w": rng.standard_normal((8, 6), np.float32), "b": np.zeros(6, np.float32)}}
specs = {{"w": P("data"), "b": P()}}
of_params = {{k: NamedSharding(mesh, s) for k, s in specs.items()}}
of_state = sharding.state_shardings(tx, params, specs, mesh)
of_batch = NamedSharding(mesh, P("data"))


def put(x, where):
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


params = {{k: put(x, of_params[k]) for k, x in params.items()}}
state = jax.jit(tx.init, out_shardings=of_state)(params)


@jax.jit
def step(params, state, x, y):
    loss_of = lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p["w"] + p["b"]) - y))
    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = tx.update(gradients, state, params, value=loss)
    return optax.apply_updates(params, updates), state


for i in range(5):
    x, y = rng.standard_normal((16, 8), np.float32), rng.standard_normal((16, 6), np.float32)
    params, state = step(params, state, put(x, of_batch), put(y, of_batch))
whole = jax.jit(lambda p: p, out_shardings=NamedSharding(mesh, P()))(params)
if process <= 0:
    np.savez(out, **{{k: np.asarray(x.addressable_data(0)) for k, x in whole.items()}})
"""


def environment(**extra):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | extra


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_fc_lopt", "velo"])
def test_two_processes_train_as_one(name, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(ROOT / "tests"), root=str(ROOT), name=name))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    outputs = {process: tmp_path / f"{process}.npz" for process in (-1, 0, 1)}
    workers = [
        subprocess.Popen([sys.executable, script, str(process), str(port), out], env=environment())
        for process, out in outputs.items()
    ]
    try:
        assert [w.wait(timeout=300) for w in workers] == [0, 0, 0]
    finally:
        for w in workers:
            w.kill()
    with np.load(outputs[-1]) as one, np.load(outputs[0]) as two:
        for key in one.files:
            bound = 2e-6 * np.max(np.abs(one[key]))
            np.testing.assert_allclose(two[key], one[key], rtol=0, atol=bound)


def restored(folder, step):
    """The arrays of a checkpoint, on one device."""
    path = folder / "checkpoints" / str(step) / "default"
    here = ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        return checkpointer.restore(path, restore_args=jax.tree.map(lambda _: here, tree))


@pytest.mark.slow
def test_fsdp_example_survives_kills(tmp_path):
    """Killed ten times while it writes checkpoints, it ends as the uninterrupted run."""
    steps = 70
    lopt_jax.save_weights(tmp_path / "weights", optimizers.weights("small_fc_lopt"))
    common = (
        f"--mesh data=2 --steps {steps} --layers 1 --width 16 --length 8 --batch 4 --text 10000 "
        "--optimizer small_fc_lopt"
    )
    command = [sys.executable, str(ROOT / "examples" / "train_fsdp.py"), *common.split()]
    command += ["--weights", str(tmp_path / "weights"), "--save-every", "1", "--print-every", "1"]
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = environment(JAX_NUM_CPU_DEVICES="2", XLA_FLAGS=quick)
    rng = random.Random(0)

    def start(folder):
        arguments = [*command, "--folder", str(folder)]
        return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, text=True)

    straight = start(tmp_path / "straight")
    killed, last = 0, 0
    while killed < 10:
        run = start(tmp_path / "killed")
        assert run.stdout is not None
        lines_left = rng.randint(1, 6)  # a checkpoint is being written after every one
        for line in run.stdout:
            if line.startswith("resumed"):
                last = int(line.split()[-1])
            lines_left -= line.startswith("step")
            if not lines_left:
                time.sleep(rng.uniform(0, 0.1))
                break
        else:
            raise AssertionError(f"ended after {killed} kills")
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        killed += 1
    final = start(tmp_path / "killed")
    text, _ = final.communicate(timeout=300)
    assert final.returncode == 0, text
    assert last > 0, "no run resumed from a checkpoint"
    straight_text, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, straight_text
    a, b = (restored(tmp_path / which, steps) for which in ("straight", "killed"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    curves = [(tmp_path / w / "losses.jsonl").read_text() for w in ("straight", "killed")]
    assert curves[0] == curves[1]
    assert (tmp_path / "killed" / "loss.png").exists()
