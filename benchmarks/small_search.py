"""Whole recipes of `lopt` side by side on the small training tasks, beside AdamW and Muon.

python benchmarks/small_search.py benchmarks/small_settings.json --out small.json

The file is a list of mappings from the recipe's fields to numbers, in place of the recipe's own.
With `--matrix-heads` they run once more with heads under the learned rule. All settings of a task
run in one program.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_sample_image

import lopt_jax
from lopt_jax.meta import evaluate
from lopt_jax.meta.networks import Mlp
from lopt_jax.meta.noise_free import noise_free_tasks, noise_free_tuning_tasks
from lopt_jax.meta.tasks import (
    Example,
    SupervisedTask,
    Tables,
    Teacher,
    cross_entropy,
    held_out_tasks,
    squared_error,
    training_tasks,
)

TASKS = (
    "digits_mlp_64",
    "digits_mlp_norm_32x3",
    "digits_conv_8",
    "china_autoencoder",
    "teacher_regression",
    "tables_few_mlp_32x2",
    "teacher_few_mlp_32x2",
    "bytes_rnn_32",
)


def wide_tasks():
    """Wide networks on little data, others than the held-out ones."""
    plain = {"activation": 0, "log_init_spread": 0.0}
    wine = Tables(("wine",), 13, 3, disguise=False)
    digits = Tables(("digits",), 64, 10, disguise=False)
    china = Tables(("china",), 64, 0, disguise=False)
    tasks = (
        SupervisedTask(
            "digits_mlp_256x2", digits, Mlp((64, 256, 256, 10)), cross_entropy, 64, **plain
        ),
        SupervisedTask("wine_mlp_48x2", wine, Mlp((13, 48, 48, 3)), cross_entropy, 32, **plain),
        SupervisedTask(
            "china_autoencoder_128", china, Mlp((64, 128, 24, 128, 64)), squared_error, 64, **plain
        ),
    )  # fmt: skip
    return {task.name: task for task in tasks}


class BlurredPatches:
    """Patches of the photograph "china", each pixel a weighted mean of 5 x 5: a smoother one."""

    def sample(self, key):
        """Nothing is random."""
        del key
        return ()

    def _rows(self, split):
        pixels = load_sample_image("china.jpg").astype(np.float32).mean(-1)
        kernel = np.float32([1, 2, 3, 2, 1]) / 9
        for axis in (0, 1):
            pixels = np.apply_along_axis(np.convolve, axis, pixels, kernel, "same")
        rows, columns = pixels.shape[0] // 8, pixels.shape[1] // 8
        patches = pixels[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8)
        patches = patches.transpose(0, 2, 1, 3).reshape(-1, 64)
        patches = np.random.default_rng(0).permutation((patches - patches.mean()) / patches.std())
        first = len(patches) - len(patches) // 5
        return jnp.asarray(patches[:first] if split == "train" else patches[first:], jnp.float32)

    def batch(self, key, content, split, size):
        """Draws patches, each its own target."""
        del content
        rows = self._rows(split)
        x = rows[jax.random.randint(key, (size,), 0, len(rows))]
        return Example(x, x)

    def examples(self, content, split, limit):
        """The first patches of a split."""
        del content
        x = self._rows(split)[:limit]
        return Example(x, x)


def learned_by_heart():
    """Few examples that long trainings learn by heart, a bottleneck, and many inputs."""
    plain = {"activation": 0, "log_init_spread": 0.0}
    digits = Tables(("digits",), 64, 10, few=(300, 500), keep_places=True)
    all_digits = Tables(("digits",), 64, 10, disguise=False)
    table = Teacher((30, 8, 2), True, (300, 500), 0.3)
    other = Teacher((20, 6, 2), True, (300, 500), 0.3)
    inputs = Teacher((192, 8, 8), True, (1500, 1600), 0.1)
    fresh = Teacher((128, 16, 4), False, None, 0.1)
    classifiers = [
        ("digits_mlp_128x2", all_digits, Mlp((64, 128, 128, 10)), 64),
        ("few_digits_mlp_128x2", digits, Mlp((64, 128, 128, 10)), 64),
        ("few_digits_mlp_norm_64x3", digits, Mlp((64, 64, 64, 64, 10), True), 64),
        ("table_mlp_32x2", table, Mlp((30, 32, 32, 2)), 32),
        ("table_mlp_norm_48x3", other, Mlp((20, 48, 48, 48, 2), True), 64),
        ("many_inputs_mlp_16x2", inputs, Mlp((192, 16, 16, 8)), 64),
    ]
    regressions = [
        ("blurred_autoencoder", BlurredPatches(), Mlp((64, 192, 16, 192, 64)), 64),
        ("many_inputs_regression", fresh, Mlp((128, 16, 16, 4)), 64),
    ]
    tasks = [SupervisedTask(n, s, m, cross_entropy, b, **plain) for n, s, m, b in classifiers]
    tasks += [SupervisedTask(n, s, m, squared_error, b, **plain) for n, s, m, b in regressions]
    return {task.name: task for task in tasks}


def tuning_tasks():
    """All tasks that constants may be chosen on, by name."""
    chosen = {name: training_tasks()[name] for name in TASKS}
    return {**chosen, **wide_tasks(), **learned_by_heart(), **noise_free_tuning_tasks()}


def lopt_of(settings, name="lopt", label_fn=None):
    """`lopt` with the recipe of a number: a contender whose "rates" are places in `settings`."""
    base = lopt_jax.Recipe()
    fields = sorted({name for one in settings for name in one})
    table = {
        name: jnp.asarray([one.get(name, _own(base, name)) for one in settings], jnp.float32)
        for name in fields
    }

    def build(place, steps):
        index = jnp.asarray(place, jnp.int32)
        chosen = {name: values[index] for name, values in table.items()}
        rate = chosen.pop("rate", 1.0)
        recipe = dataclasses.replace(base, **chosen)
        return lopt_jax.lopt(steps, learning_rate=rate, recipe=recipe, label_fn=label_fn)

    return evaluate.Contender(name, build, tuple(float(i) for i in range(len(settings))))


def _own(base, name):
    return 1.0 if name == "rate" else getattr(base, name)


def main():
    """Runs the search and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path, nargs="?", help="left out: the recipe as it is")
    parser.add_argument("--out", type=Path, default=Path("outputs/small.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--horizons", default="200,1000")
    parser.add_argument("--tasks", help="names with commas; left out: all of the kind")
    parser.add_argument("--held-out", action="store_true", help="the held-out tasks, for evidence")
    parser.add_argument(
        "--noise-free", action="store_true", help="those with nothing to regularise"
    )
    parser.add_argument("--matrix-heads", action="store_true", help="heads are matrices, too")
    parser.add_argument("--baselines", default="adamw,muon", help="names with commas; may be empty")
    options = parser.parse_args()
    begin = time.perf_counter()
    settings = json.loads(options.settings.read_text()) if options.settings else [{}]
    tasks = (
        held_out_tasks()
        if options.held_out
        else noise_free_tasks()
        if options.noise_free
        else tuning_tasks()
    )
    if options.tasks:
        tasks = {name: tasks[name] for name in options.tasks.split(",")}
    known = evaluate.baselines()
    contenders = [lopt_of(settings)]
    if options.matrix_heads:
        learned = lambda path, leaf: "learned" if leaf.ndim > 1 else None  # noqa: E731
        contenders.append(lopt_of(settings, "lopt_matrix_heads", learned))
    contenders += [known[n] for n in options.baselines.split(",") if n]
    horizons = [int(h) for h in options.horizons.split(",")]
    curves = evaluate.run_curves(
        tasks, contenders, horizons, options.seeds, ahead=14,
        on_progress=lambda text: print(f"{time.perf_counter() - begin:5.0f} s {text}", flush=True),
    )  # fmt: skip
    records = []
    for (task, name, horizon), found in curves.items():
        contender = next(c for c in contenders if c.name == name)
        valid = np.asarray(found.valid)[..., -1].mean(-1)
        records.append(
            {
                "task": task, "optimizer": name, "horizon": horizon,
                "settings": settings if name.startswith("lopt") else list(contender.learning_rates),
                "valid": [float(f"{x:.5g}") for x in valid],
                "train": [float(f"{x:.5g}") for x in np.asarray(found.train)[..., -1].mean(-1)],
            }
        )  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records))
    for record in records:
        losses = record["valid"]
        best = int(np.nanargmin(losses))
        name = f"{record['task']:24} {record['horizon']:5} {record['optimizer']:6}"
        found = record["settings"][best]
        print(f"{name} first {losses[0]:.4g} best {losses[best]:.4g} by {found}")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
