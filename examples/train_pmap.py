"""Data parallelism with pmap and a learned optimizer whose state is split over the devices.

    JAX_NUM_CPU_DEVICES=8 python examples/train_pmap.py

New code is better off with jit and shardings (see train_fsdp.py); this is for programs that are
written with pmap. The one change is `distributed`: it averages the gradients by a reduce-scatter,
updates each device's share and gathers the updates, so there is no pmean of the gradients here.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lopt_jax
from lopt_jax import sharding

STEPS, BATCH = 200, 64  # of each device


def predict(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]


def main(weights: str = "small_fc_lopt", steps: int = STEPS) -> float:
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((16, 4)).astype(np.float32)
    params = {
        "w0": 0.3 * rng.standard_normal((16, 512)).astype(np.float32),
        "b0": np.zeros(512, np.float32),
        "w1": 0.05 * rng.standard_normal((512, 4)).astype(np.float32),
        "b1": np.zeros(4, np.float32),
    }
    devices = jax.local_device_count()
    tx = sharding.distributed(lopt_jax.small_fc_lopt(weights), axis_name="devices")

    # Parameters are whole on every device; the state of large leaves is not.
    params = jax.tree.map(lambda x: np.stack([x] * devices), params)
    state = jax.pmap(tx.init, axis_name="devices")(params)

    @functools.partial(jax.pmap, axis_name="devices")
    def train_step(params, state, x, y):
        loss_of = lambda params: jnp.mean(jnp.square(predict(params, x) - y))  # noqa: E731
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(loss, "devices")

    for step in range(steps):
        x = rng.standard_normal((devices, BATCH, 16)).astype(np.float32)
        params, state, loss = train_step(params, state, x, np.tanh(x @ teacher))
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss[0]):.4f}", flush=True)
    return float(loss[0])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # for --help
    main()
