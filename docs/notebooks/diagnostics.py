# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look at a run
#
# `diagnose` measures a step inside the jitted program: the ratio of every tensor's update to the
# tensor, and the multiplier that a learned controller chose. `plot_run` draws a run. Here VeLO's
# rule trains a small network. Then `lopt` trains one in which a layer gets no gradient, and the
# measures show which one.
#
# You need `pip install 'lopt_jax[plot]'`.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lopt_jax
from lopt_jax import diagnostics

# %%
key = jax.random.key(0)
x = jax.random.normal(key, (256, 8))
y = jnp.sin(x.sum(1, keepdims=True))
params = {
    "hidden": {"kernel": jax.random.normal(key, (8, 64)) / 8**0.5, "bias": jnp.zeros(64)},
    "head": {"kernel": jax.random.normal(key, (64, 1)) / 64**0.5, "bias": jnp.zeros(1)},
}


def loss_of(params):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)


def wrong_loss_of(params):
    hidden = jax.lax.stop_gradient(params["hidden"])
    return loss_of({"hidden": hidden, "head": params["head"]})


STEPS = 150


def run(tx, loss_of):
    """Losses and measures of a training."""

    def step(carry, _):
        params, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params, value=loss)
        measures = diagnostics.diagnose(updates, state, params)
        return (optax.apply_updates(params, updates), state), (loss, measures)

    start = (params, tx.init(params))
    _, (losses, measures) = jax.jit(lambda: jax.lax.scan(step, start, length=STEPS))()
    history = [jax.tree.map(lambda leaf, i=i: leaf[i], measures) for i in range(STEPS)]
    return np.asarray(losses), history


# %% [markdown]
# ## As it should be
#
# The learned multiplier falls towards the end: the controller makes its own schedule. At the end,
# updates are small compared with their parameters.

# %%
tx = lopt_jax.velo(num_steps=STEPS, weights="velo_small", weight_decay=0.001)
losses, history = run(tx, loss_of)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}")
assert losses[-1] < 0.3 * losses[0]
assert history[-1].scheduler < history[10].scheduler
lopt_jax.plot.plot_run(history, losses)

# %% [markdown]
# ## A layer that does not learn
#
# A `stop_gradient` is in the wrong place. The loss still falls, but less. The ratio of update to
# parameter is zero for every tensor of the layer, from the first step on. (Decay is turned off
# here: it would shrink the kernel also without a gradient.)

# %%
wrong, wrong_history = run(lopt_jax.lopt(num_steps=STEPS, weight_decay=0.0), wrong_loss_of)
right, _ = run(lopt_jax.lopt(num_steps=STEPS), loss_of)
print(f"loss {wrong[0]:.3f} -> {wrong[-1]:.4f}; without the mistake {right[-1]:.4f}")
assert right[-1] < wrong[-1]
lopt_jax.plot.plot_run(wrong_history, wrong)

# %%
ratios = wrong_history[20].update_to_parameter
for path, ratio in jax.tree_util.tree_leaves_with_path(ratios):
    print(jax.tree_util.keystr(path), f"{float(ratio):.2g}")
assert float(ratios["hidden"]["kernel"]) == 0.0 < float(ratios["head"]["kernel"])

# %% [markdown]
# ## Numbers for a logger
#
# `to_scalars` gives flat names, for TensorBoard or a table.

# %%
{name: float(value) for name, value in diagnostics.to_scalars(history[-1]).items()}
