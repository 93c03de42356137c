"""Milliseconds of a whole training step, of a Flax model, with each optimizer; see `--help`.

python benchmarks/train_step.py --models gpt2_355m --json docs/benchmarks/train_step.json

GPT-2 355M takes batches of 4 x 1024 tokens, ViT-B/16 of 32 images, the MLP 784-512-512-10 of 128
rows; data is random, parameters are float32, the two large models compute in bfloat16. Variants
take turns in one process. Steps end with `lopt_jax.update_params`, which for AdamW is its update
and `optax.apply_updates`.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import optax

from lopt_jax import benchmark, update_params
from lopt_jax.benchmark import OPTIMIZERS, Record, Variant

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def gpt2_355m() -> tuple[Callable, Callable, Any]:
    """Initialisation from a key, the loss of parameters and batch, and a batch."""
    module = models.GPT2(dtype=jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(0), (4, 1025), 0, module.vocabulary)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return cross_entropy(module.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:]).mean()

    return lambda key: module.init(key, tokens[:1, :8])["params"], loss, tokens


def vit_b16() -> tuple[Callable, Callable, Any]:
    """As `gpt2_355m`."""
    module = models.ViT(dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(0), (32, 224, 224, 3), jnp.float32)
    labels = jax.random.randint(jax.random.key(1), (32,), 0, module.classes)

    def loss(params: Any, batch: Any) -> jax.Array:
        images, labels = batch
        return cross_entropy(module.apply({"params": params}, images), labels).mean()

    return lambda key: module.init(key, images[:1])["params"], loss, (images, labels)


def mlp() -> tuple[Callable, Callable, Any]:
    """As `gpt2_355m`, of the MLP 784-512-512-10."""
    layers = (nn.Dense(512), nn.relu, nn.Dense(512), nn.relu, nn.Dense(10, name="head"))
    module = nn.Sequential(layers)
    rows = jax.random.normal(jax.random.key(0), (128, 784), jnp.float32)
    labels = jax.random.randint(jax.random.key(1), (128,), 0, 10)

    def loss(params: Any, batch: Any) -> jax.Array:
        rows, labels = batch
        return cross_entropy(module.apply({"params": params}, rows), labels).mean()

    return lambda key: module.init(key, rows)["params"], loss, (rows, labels)


MODELS = {"gpt2_355m": gpt2_355m, "vit_b16": vit_b16, "mlp": mlp}


def step_of(tx: Any, init: Callable, loss: Callable, batch: Any) -> tuple[Callable, tuple]:
    """A training step with an optimizer, and shapes and dtypes of its arguments."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        params, state = update_params(tx, gradients, state, params, value=value)
        return params, state, value

    params = jax.eval_shape(init, jax.random.key(0))
    return step, (params, *jax.eval_shape(lambda p, b: (tx.init(p), b), params, batch))


def variant_of(optimizer: str, backend: str, init: Callable, loss: Callable, batch: Any) -> Variant:
    """A training step with an optimizer."""
    tx = OPTIMIZERS[optimizer].make(backend)
    step, arguments = step_of(tx, init, loss, batch)
    compiled, variant = benchmark.compile_step(step, arguments, donate=(0, 1))
    carry: list[Any] = []

    def run(i: int) -> Any:
        if not carry:
            params = jax.jit(init)(jax.random.key(0))
            carry[:] = [params, tx.init(params)]
        carry[0], carry[1], value = compiled(*carry, batch)
        return value

    variant.run = run
    return variant


def measure(model: str, variants: list[tuple[str, str]], repetitions: int) -> list[Record]:
    """Records of one model, a variant (optimizer, backend) each."""
    init, loss, batch = MODELS[model]()
    built = {}
    for optimizer, backend in variants:
        built[optimizer, backend] = variant_of(optimizer, backend, init, loss, batch)
        seconds = built[optimizer, backend].compile_s
        print(f"{model}: {optimizer} on {backend} compiled in {seconds:.1f} s", flush=True)
    benchmark.take_turns(list(built.values()), repetitions, seconds=1.0)
    return [
        benchmark.record_of(
            v, model, *names, "float32", 1e3 * statistics.median(v.seconds), None, step="train"
        )
        for names, v in built.items()
    ]


def main() -> None:
    """Measures, prints a table and writes the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["velo"])
    parser.add_argument("--backends", nargs="+", choices=("xla", "auto"), default=["auto"])
    parser.add_argument("--repetitions", type=int, default=10, help="timings of each variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")
    options = parser.parse_args()
    variants = [("optax.adamw", "xla")]
    variants += [(o, b) for o in options.optimizers for b in options.backends]
    records: list[Record] = []
    for model in options.models:
        records += measure(model, variants, options.repetitions)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")
    benchmark.print_table(records)


if __name__ == "__main__":
    main()
