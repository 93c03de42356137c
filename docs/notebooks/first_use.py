# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First use
#
# In five minutes: train a network with `lopt`, see what it does with every parameter, compare it
# with AdamW at five rates, save the training and resume it.
#
# You need `pip install 'lopt_jax[examples]'`.

# %%
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

import lopt_jax
from lopt_jax.plot import COLOURS

# %% [markdown]
# ## Data and model
#
# The handwritten digits of scikit-learn: 1,797 images of 8x8 pixels. Every fifth is for testing.

# %%
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
test = np.arange(len(images)) % 5 == 0


class Classifier(nnx.Module):
    """Two hidden layers."""

    def __init__(self, rngs):
        self.hidden = nnx.List([nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 128, rngs=rngs)])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        """From (batch, 64) pixels to (batch, 10) logits."""
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


def loss_of(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, gradients = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, gradients, value=loss)
    return loss


test_loss = nnx.jit(loss_of)

# %% [markdown]
# ## What `lopt` will do
#
# It takes one number: how many updates the whole training makes. `describe` computes nothing. It
# shows the rule of every parameter, the size of its step, its decay, and why.

# %%
STEPS = 300
tx = lopt_jax.lopt(num_steps=STEPS)
model = Classifier(nnx.Rngs(0))
print(lopt_jax.describe(tx, nnx.state(model, nnx.Param)))

# %% [markdown]
# ## Train, beside AdamW at five rates


# %%
def train(tx, steps=STEPS):
    """The trained model, its optimizer, and test losses by step."""
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    draw = np.random.default_rng(0)
    curve = []
    for step in range(steps):
        rows = draw.choice(np.flatnonzero(~test), 128)
        train_step(model, optimizer, images[rows], labels[rows])
        if step % 10 == 9:
            curve.append((step + 1, float(test_loss(model, images[test], labels[test]))))
    return model, optimizer, np.array(curve)


def adamw(rate):
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 20, STEPS)
    return optax.adamw(schedule, weight_decay=0.1)


model, optimizer, curve = train(tx)
others = {rate: train(adamw(rate))[2] for rate in (0.002, 0.008, 0.032, 0.128, 0.512)}

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
best = min(others, key=lambda rate: others[rate][-1, 1])
for rate, other in others.items():
    style = {"linewidth": 2} if rate == best else {"alpha": 0.35}
    axes.plot(*other.T, color=COLOURS["adamw"], label=f"AdamW {rate}", **style)
axes.plot(*curve.T, color=COLOURS["lopt"], linewidth=2, label="lopt, nothing tuned")
axes.set(xlabel="step", ylabel="test loss (nats)", yscale="log", title="digits")
_ = axes.legend()
# %%
accuracy = float(np.mean(np.argmax(model(images[test]), -1) == labels[test]))
print(
    f"lopt: {curve[-1, 1]:.3f} nats, {accuracy:.1%} right; AdamW {best}: {others[best][-1, 1]:.3f}"
)
assert curve[-1, 1] < 0.3
assert accuracy > 0.9

# %% [markdown]
# One seed and one small task prove little. [Models of real size](../scale.md) has the evidence.
#
# ## Save and resume
#
# Orbax saves model and optimizer. The restored training goes on bit for bit.

# %%
with ocp.CheckpointManager(tempfile.mkdtemp()) as manager:  # your folder: an absolute path
    manager.save(STEPS, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
    manager.wait_until_finished()
    copy = Classifier(nnx.Rngs(1))
    copy_optimizer = nnx.Optimizer(copy, tx, wrt=nnx.Param)
    empty = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state((copy, copy_optimizer)))
    restored = manager.restore(STEPS, args=ocp.args.StandardRestore(empty))
    nnx.update((copy, copy_optimizer), restored)

x, y = images[~test][:128], labels[~test][:128]
assert train_step(copy, copy_optimizer, x, y) == train_step(model, optimizer, x, y)
