"""A linen model trained by `lopt`: python examples/first_linen.py 300."""

import sys

import flax.linen as nn
import jax

import lopt_jax

steps = int(sys.argv[1])
x = jax.random.normal(jax.random.key(0), (256, 4))
y = jax.numpy.sin(x.sum(1, keepdims=True))
model, tx = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(1)]), lopt_jax.lopt(steps)
params = model.init(jax.random.key(1), x)
state = tx.init(params)
gradients_of = jax.jit(jax.value_and_grad(lambda p: ((model.apply(p, x) - y) ** 2).mean()))
for _ in range(steps):
    loss, gradients = gradients_of(params)
    params, state = lopt_jax.update_params(tx, gradients, state, params)
print("loss", loss)
