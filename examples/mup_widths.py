"""μP: the same learning curve at two widths, with one learned optimizer and nothing tuned.

    python examples/mup_widths.py [--weights NAME_OR_PATH]

Trains a small MLP on scikit-learn's handwritten digits at two widths, under μP (changes to the
model, and `lopt_jax.mulo` in place of `small_fc_lopt`; see docs/mup.md) and in the usual
parametrisation, and prints the losses.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import lopt_jax

BASE_WIDTH = 32


class MLP(nn.Module):
    """Two hidden layers; under μP the output layer starts at zero and has a multiplier."""

    width: int
    mup: bool

    @nn.compact
    def __call__(self, x):
        """Logits of images (batch, 64)."""
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        if not self.mup:
            return nn.Dense(10)(x)
        return nn.Dense(10, kernel_init=nn.initializers.zeros)(x * BASE_WIDTH / self.width)


def train(width, mup, weights, steps, batch=128, seed=0):
    """Losses of the minibatches, smoothed over ten steps."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    model = MLP(width, mup)
    params = model.init(jax.random.key(seed), images[:1])

    if mup:
        base = jax.eval_shape(MLP(BASE_WIDTH, mup).init, jax.random.key(0), images[:1])
        tx = lopt_jax.mulo(lopt_jax.mup.width_multipliers(params, base), weights)
    else:
        tx = lopt_jax.small_fc_lopt(weights)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    order = np.random.default_rng(seed)
    losses = []
    for _ in range(steps):
        chosen = order.integers(len(images), size=batch)
        params, state, value = step(params, state, images[chosen], labels[chosen])
        losses.append(float(value))
    return np.convolve(losses, np.ones(10) / 10, mode="valid")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="small_fc_lopt", help="a name or a path")
    parser.add_argument("--widths", type=int, nargs=2, default=[64, 1024])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    weights = lopt_jax.load_weights(options.weights)

    curves = {
        (mup, width): train(width, mup, weights, options.steps)
        for mup in (True, False)
        for width in options.widths
    }
    shown = [s for s in (0, 10, 25, 50, 100, 200, 400, 800) if s < options.steps - 10]
    print("loss at step".ljust(24), *(f"{s:>8}" for s in shown))
    for (mup, width), losses in curves.items():
        name = f"{'muP' if mup else 'usual'}, width {width}"
        print(name.ljust(24), *(f"{losses[s]:8.4f}" for s in shown))
    for mup in (True, False):
        narrow, wide = (curves[mup, width] for width in options.widths)
        gap = np.max(np.abs(np.log(wide / narrow)[shown]))
        name = "muP" if mup else "usual"
        print(f"{name}: losses of the two widths differ by at most {np.expm1(gap):.0%}")


if __name__ == "__main__":
    main()
