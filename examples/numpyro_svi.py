"""Stochastic variational inference in NumPyro by `lopt`: another library's trainer, unchanged.

    pip install numpyro
    python examples/numpyro_svi.py --steps 1000

NumPyro takes any optax transformation through `optax_to_numpyro`, and passes on the loss. The model
is a logistic regression on the breast cancer table of scikit-learn: the posterior of its weights,
as a normal distribution with a full covariance, and the held-out accuracy of its mean prediction.
Adam at the given rate runs beside it.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.optim import optax_to_numpyro
from sklearn.datasets import load_breast_cancer

import lopt_jax


def model(x: jax.Array, y: jax.Array | None = None) -> None:
    """Logistic regression with a normal prior on weights (features,) and bias."""
    prior = dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1)
    weights = numpyro.sample("weights", prior)
    bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Standardised rows (N, 30) and labels: for training, then every fifth for testing."""
    x, y = load_breast_cancer(return_X_y=True)
    test = np.arange(len(x)) % 5 == 0
    x = (x - x[~test].mean(0)) / x[~test].std(0)
    x, y = x.astype(np.float32), y.astype(np.int32)
    return x[~test], y[~test], x[test], y[test]


def infer(tx: optax.GradientTransformation, steps: int) -> tuple[np.ndarray, float]:
    """The negative evidence lower bounds, and the test accuracy of the posterior."""
    x, y, x_test, y_test = load()
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, optax_to_numpyro(tx), Trace_ELBO(num_particles=8))
    result = svi.run(jax.random.key(0), steps, x, y, progress_bar=False)
    predictive = Predictive(model, guide=guide, params=result.params, num_samples=200)
    votes = predictive(jax.random.key(1), x_test)["y"].mean(0)
    return np.asarray(result.losses), float(np.mean((votes > 0.5) == y_test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.01, help="of adam")
    args = parser.parse_args()
    optimizers = {"lopt": lopt_jax.lopt(args.steps), f"adam {args.rate}": optax.adam(args.rate)}
    for name, tx in optimizers.items():
        losses, accuracy = infer(tx, args.steps)
        end = losses[-max(args.steps // 20, 1) :].mean()
        print(
            f"{name}: -ELBO {losses[0]:.1f} -> {end:.1f}, test accuracy {accuracy:.1%}", flush=True
        )


if __name__ == "__main__":
    main()
