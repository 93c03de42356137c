"""An NNX model trained by `lopt`: python examples/first_nnx.py 300."""

import sys

import jax
from flax import nnx

import lopt_jax

steps = int(sys.argv[1])
x = jax.random.normal(jax.random.key(0), (256, 4))
y = jax.numpy.sin(x.sum(1, keepdims=True))
rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(4, 64, rngs=rngs), nnx.tanh, nnx.Linear(64, 1, rngs=rngs))
optimizer = nnx.Optimizer(model, lopt_jax.lopt(steps), wrt=nnx.Param)
gradients_of = nnx.jit(nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean()))
for _ in range(steps):
    loss, gradients = gradients_of(model)
    optimizer.update(model, gradients)
print("loss", loss)
