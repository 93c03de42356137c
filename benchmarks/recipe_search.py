"""Searches the constants of `lopt`'s recipe on the tuning tasks of the scale suite.

One coordinate after the other, several values side by side, until the time is over:
python benchmarks/recipe_search.py benchmarks/recipe_plan.json --seconds 540 --out search.jsonl
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import lopt_jax
from lopt_jax.meta.scale import contenders, run
from lopt_jax.meta.scale.tasks import stacked_axes, task_named
from lopt_jax.optimizers.plans import names_of

BASE = {
    # the direction: weights of features of root mean square one, and decays of the momenta
    "g": 0.33, "m0": 0.0, "m1": 1.0, "m2": 0.0, "ng": 0.0, "n0": 0.0, "n1": 0.0, "n2": 0.0,
    "f0": 0.0, "f1": 0.0, "f2": 0.0, "d0": 0.9, "d1": 0.95, "d2": 0.99, "dv": 0.95, "sign": 0.0,
    "nor": 0.0, "dn": 0.95,
    # the recipe: size of the step, decay, rates of Adam, schedule
    "c": 0.05, "a": 0.0, "b": 0.5, "e": 0.0, "kappa": 3.0, "cautious": 0.0,
    "embedding": 0.016, "head": 0.008, "vector": 0.008, "kappa_adam": 0.0,
    "warm": 0.1, "linear": 1.0, "ab1": 0.9, "ab2": 0.95,
}  # fmt: skip


def unit(x):
    """Root mean square one over the last two axes."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), (-1, -2), keepdims=True) + 1e-20)


def orthogonal(x):
    """Five Newton-Schulz iterations in bfloat16 over the last two axes."""
    wide = x.shape[-1] > x.shape[-2]
    x = x if wide else jnp.swapaxes(x, -1, -2)
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), (-1, -2), keepdims=True)) + 1e-8)
    x = x.astype(jnp.bfloat16)
    for _ in range(5):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    x = x.astype(jnp.float32)
    return x if wide else jnp.swapaxes(x, -1, -2)


def prototype(settings, horizon):
    """A linear direction over features, orthogonalised, with every constant traced."""

    def is_adam(path, x):
        is_named = any(name in contenders.ADAM_LEAVES for name in names_of(path))
        return is_named or x.ndim - stacked_axes(path, x) < 2

    def init(params):
        def leaf(path, p):
            zero = jnp.zeros_like(p)
            if is_adam(path, p):
                return {"m1": zero, "v": zero}
            row, column = jnp.zeros(p.shape[:-1]), jnp.zeros((*p.shape[:-2], p.shape[-1]))
            return {
                "m0": zero, "m1": zero, "m2": zero, "v": zero, "row": row, "column": column,
                "nor": column,
            }  # fmt: skip

        return jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(leaf, params)

    def update(gradients, state, params, **extra):
        count, accumulators = state
        norm = optax.global_norm(gradients)
        gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / (norm + 1e-9)), gradients)
        warm = jnp.maximum(settings["warm"] * horizon, 1.0)
        progress = jnp.clip((count - warm) / jnp.maximum(horizon - warm, 1.0), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        down = settings["linear"] * (1.0 - progress) + (1.0 - settings["linear"]) * cosine
        schedule = jnp.minimum((count + 1) / warm, down)

        def adam(path, g, s, p):
            names = names_of(path)
            b1, b2 = settings["ab1"], settings["ab2"]
            m, v = b1 * s["m1"] + (1 - b1) * g, b2 * s["v"] + (1 - b2) * g * g
            step = (m / (1 - b1 ** (count + 1))) / (jnp.sqrt(v / (1 - b2 ** (count + 1))) + 1e-8)
            name = "head" if "head" in names else "vector" if p.ndim < 2 else "embedding"
            if stacked_axes(path, p):
                name = "vector"
            decay = settings["kappa_adam"] if name != "vector" else 0.0
            return -schedule * (settings[name] * step + decay / horizon * p), {"m1": m, "v": v}

        def learned(g, s, p):
            momenta = [
                settings[f"d{i}"] * s[f"m{i}"] + (1 - settings[f"d{i}"]) * g for i in range(3)
            ]
            v = settings["dv"] * s["v"] + (1 - settings["dv"]) * g * g
            square = g * g + 1e-30
            row = 0.95 * s["row"] + 0.05 * jnp.mean(square, -1)
            column = 0.95 * s["column"] + 0.05 * jnp.mean(square, -2)
            root = jax.lax.rsqrt(v + 1e-16)
            factor = jax.lax.rsqrt(row / jnp.mean(row, -1, keepdims=True))[..., None]
            factor = factor * jax.lax.rsqrt(column)[..., None, :]
            direction = settings["g"] * unit(g) + settings["ng"] * unit(g * root)
            for i, m in enumerate(momenta):
                direction += settings[f"m{i}"] * unit(m) + settings[f"n{i}"] * unit(m * root)
                direction += settings[f"f{i}"] * unit(m * factor)
            direction += settings["sign"] * jnp.sign(direction)
            step = unit(orthogonal(direction))
            nor = settings["dn"] * s["nor"] + (1 - settings["dn"]) * jnp.mean(step * step, -2)
            scale = (nor / (1 - settings["dn"] ** (count + 1)) + 1e-12) ** (-0.5 * settings["nor"])
            step = unit(step * scale[..., None, :])
            rows, columns = p.shape[-2:]
            size = (
                settings["c"]
                * max(rows, columns) ** -settings["a"]
                * min(rows, columns) ** -settings["b"]
                * (columns / rows) ** settings["e"]
            )
            shrinks = jnp.where(step * p >= 0, 1.0, 1.0 - settings["cautious"])
            update = -schedule * (size * step + settings["kappa"] / horizon * shrinks * p)
            kept = {f"m{i}": m for i, m in enumerate(momenta)}
            return update, {**kept, "v": v, "row": row, "column": column, "nor": nor}

        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        results = [
            adam(path, g, s, p) if is_adam(path, p) else learned(g, s, p)
            for (path, p), g, s in zip(
                leaves, treedef.flatten_up_to(gradients), treedef.flatten_up_to(accumulators),
                strict=True,
            )
        ]  # fmt: skip
        updates = treedef.unflatten([u for u, _ in results])
        return updates, (count + 1, treedef.unflatten([s for _, s in results]))

    return optax.GradientTransformationExtraArgs(init, update)


RECIPE = tuple(
    field.name for field in dataclasses.fields(lopt_jax.Recipe) if field.name != "adam_windows"
)


def recipe(settings, horizon):
    """`lopt` with the constants of its recipe traced."""
    constants = lopt_jax.Recipe(**{name: settings[name] for name in RECIPE})
    return lopt_jax.lopt(horizon, recipe=constants, stacked_axes=stacked_axes)


def recipe_base():
    """The recipe as it is."""
    return {name: getattr(lopt_jax.Recipe(), name) for name in RECIPE}


BUILDS = {
    "recipe": (recipe, RECIPE),
    "lopt": (contenders.LOPT.build, ("rate",)),
    "prototype": (prototype, tuple(BASE)),
    "muon": (contenders.MUON.build, ("rate",)),
    "adamw": (contenders.ADAMW.build, ("rate",)),
}


def settings_of(job, base):
    """The settings that a job tries: one number at several values, or named changes."""
    if "values" in job:
        return [{**base, job["name"]: value} for value in job["values"]]
    return [{**base, **changes} for changes in job["settings"]]


def label_of(job, i):
    """What is different in a job's setting."""
    return f"{job['values'][i]:.4g}" if "values" in job else str(job["settings"][i])


class Search:
    """Coordinates one after the other: a setting that is better becomes the base of the next jobs.

    Better is by more than runs of one setting differ among themselves.
    """

    margin = 0.004

    def __init__(self, start):
        """`start`: numbers in place of those of `BASE`."""
        self.base = {**BASE, **start}
        self.measured = None  # task, horizon and loss of the base

    def learn(self, job, settings, losses):
        """Takes the best of a job's settings, if it is better than the base."""
        loss, best = min(zip(losses, settings, strict=True), key=lambda pair: pair[0])
        there = (job["task"], job["horizon"])
        elsewhere = self.measured is None or self.measured[0] != there
        if elsewhere or loss < self.measured[1] - self.margin:
            self.base, self.measured = best, (there, loss)


def main():
    """Runs the jobs of a plan while there is time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", help="a JSON file: lanes of tasks, a start, and jobs in order")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/cache"))
    parser.add_argument("--out", type=Path, default=Path("outputs/search.jsonl"))
    parser.add_argument("--seconds", type=float, default=540)
    options = parser.parse_args()
    begin = time.perf_counter()
    plan = json.loads(Path(options.plan).read_text())
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def say(text):
        print(f"{time.perf_counter() - begin:6.0f}s {text}", flush=True)

    keys = list(dict.fromkeys((job["task"], job["build"]) for job in plan["jobs"]))
    tasks = {name: task_named(name) for name, _ in keys}
    data = {name: task.load(options.data, options.cache) for name, task in tasks.items()}
    say(f"data of {', '.join(tasks)}")
    programs = run.compile_all(
        {
            (task, build): functools.partial(
                run.program, tasks[task], BUILDS[build][0], data[task], BUILDS[build][1],
                plan["lanes"][task],
            )
            for task, build in keys
        },
        12,
    )  # fmt: skip
    search = Search(plan.get("start", {}))
    for job in plan["jobs"]:
        task, build = job["task"], job["build"]
        compiled = programs[task, build].result()
        bases = {"prototype": search.base, "recipe": recipe_base()}
        settings = settings_of(job, bases.get(build, {}))
        curves = []
        for i in range(0, len(settings), compiled.lanes):
            if time.perf_counter() - begin > options.seconds:
                say(f"no time left for {job}")
                return
            group = settings[i : i + compiled.lanes]
            seeds = [job.get("seed", 0)] * len(group)
            curves += run.train(compiled, tasks[task], data[task], group, seeds, job["horizon"], 10)
        with options.out.open("a") as file:
            for one, curve in zip(settings, curves, strict=True):
                record = {
                    "task": task, "optimizer": build, "steps": job["horizon"], "settings": one,
                    "validation": curve.validation,
                }  # fmt: skip
                file.write(json.dumps(record) + "\n")
        losses = [curve.validation[-1] for curve in curves]
        shown = [f"{label_of(job, i)}: {loss:.4f}" for i, loss in enumerate(losses)]
        say(f"{task} {build} {job['horizon']} {job.get('name', '')} {'  '.join(shown)}")
        if build == "prototype" and not job.get("look"):
            search.learn(job, settings, [loss if loss == loss else 1e9 for loss in losses])
    say(f"found: {search.base}")


if __name__ == "__main__":
    main()
