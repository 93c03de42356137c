"""Chooses learning rate, weight decay and start of meta-training, on meta-training tasks only.

Runs grids of settings of the learned rules, and tuned adamw and muon, on tasks that meta-training
may use: final held-out loss, every seed a problem of its own. Prints for each grid the settings by
their mean log ratio to tuned adamw. Held-out tasks are never touched.

    python benchmarks/meta_calibrate.py --curves FOLDER --json calibration.json
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.meta import evaluate
from lopt_jax.meta.configs import CONFIGS
from lopt_jax.meta.initial import initial_parameters
from lopt_jax.meta.rules import cosine_schedule, decays_at_rank_two, make_rule
from lopt_jax.meta.tasks import training_tasks
from lopt_jax.weights import load_weights

TASKS = (
    "digits_mlp_64,digits_conv_8,china_autoencoder,bytes_rnn_32,tables_few_mlp_32x2,"
    "teacher_few_mlp_32x2,tables_mlp_32x2,diabetes_mlp,digits_mlp_norm_32x3"
)
MIXES = ((1.0, 0.0), (0.6, 0.4), (0.0, 1.0))


def grid(*axes):
    return tuple(itertools.product(*axes))


def shipped(name, rates, decays, path=None):
    """Weights as they are, times a learning rate, with a weight decay."""
    weights = load_weights(path or name)

    def build(setting, steps):
        rule = make_rule(weights.architecture, weights.config, weight_decay=setting[1])
        if weights.architecture in ("celo", "velo"):
            return rate_of_controlled(weights, setting, steps)
        return rule(weights.params, steps, lambda step: setting[0] * cosine_schedule(steps)(step))

    return evaluate.Contender(name, build, grid(rates, decays))


def decays_apart(name, rates, decays, adam_factors, mask=None):
    """Celo2, whose AdamW (biases, norms) has a factor of the matrices' weight decay."""
    import lopt_jax

    weights = load_weights(name)

    def build(setting, steps):
        rate, decay, factor = setting
        return lopt_jax.celo2(
            lambda step: rate * cosine_schedule(steps)(step),
            weights,
            weight_decay=decay,
            adam_weight_decay=factor * decay,
            weight_decay_mask=mask,
            backend="xla",
        )

    label = f"{name}_{'apart' if mask is None else 'masked'}"
    return evaluate.Contender(label, build, grid(rates, decays, adam_factors))


def rate_of_controlled(weights, setting, steps):
    import lopt_jax

    make = getattr(lopt_jax, weights.architecture)
    return make(
        steps, weights=weights, learning_rate=setting[0], weight_decay=setting[1], backend="xla"
    )


def start(name, scales, decays, parameter_gain):
    """The start of meta-training with other gains: the last layer is linear in them.

    Args:
      name: of a config.
      scales: factors of the gradient's features.
      decays: weight decays, or gains of the parameter itself.
      parameter_gain: whether `decays` are gains of the parameter.
    """
    config = CONFIGS[name]
    architecture = dict(config.architecture_config)
    theta = initial_parameters(
        config.architecture,
        jax.random.key(0),
        architecture,
        {"rms_0": 1.0, "momentum_0": 1.0, "parameter": 1.0},
    )
    last = f"w{architecture['hidden_layers']}"

    def build(setting, steps):
        scale, decay, rms, momentum = setting
        parameter = decay if parameter_gain else 0.0 * decay
        gains = jnp.stack([scale * rms, scale * momentum, parameter])
        output = theta["mlp"][last]
        rows = output[..., :6, 0] * jnp.repeat(gains, 2)
        changed = {**theta["mlp"], last: output.at[..., :6, 0].set(rows)}
        rule = make_rule(
            config.architecture, architecture, config.learning_rate_peak,
            0.0 if parameter_gain else decay,
        )  # fmt: skip
        return rule({**theta, "mlp": changed}, steps, cosine_schedule(steps))

    settings = tuple((s, c, *mix) for s, c, mix in grid(scales, decays, MIXES))
    return evaluate.Contender(f"{name}_start", build, settings)


def contenders():
    """Makers of the contenders by name."""
    every = evaluate.baselines()
    small, fc_decays = (0.25, 0.5, 1.0, 2.0, 4.0), (0.0, 1e-3, 3e-3, 1e-2, 3e-2)
    rates, decays = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), (0.0, 0.3, 1.0, 2.0, 3.0, 5.0, 10.0)
    return {
        "adamw": lambda: every["adamw"],
        "muon": lambda: every["muon"],
        "celo2_small": lambda: shipped("celo2_small", rates, decays),
        "celo2_apart": lambda: decays_apart(
            "celo2_small", (4e-3, 1e-2, 2e-2), (1.0, 2.0, 3.0), (0.0, 0.1, 1.0)
        ),
        "celo2_masked": lambda: decays_apart(
            "celo2_small", (4e-3, 1e-2, 2e-2), (1.0, 2.0, 3.0), (0.0,), decays_at_rank_two
        ),
        "celo_start": lambda: start("celo_small", (0.25, 0.5, 1.0, 2.0), (0, 0.03, 0.1, 0.3), True),
        "celo_small": lambda: shipped("celo_small", small, (0.0, 3e-4, 1e-3, 3e-3, 1e-2)),
        "fc_start": lambda: start("small_fc_lopt", (0.5, 1.0, 2.0, 4.0), fc_decays, False),
        "small_fc_lopt": lambda: shipped("small_fc_lopt", small, fc_decays),
        "velo_small": lambda: shipped("velo_small", small, (0.0, 3e-4, 1e-3, 3e-3)),
    }


def summarise(curves, made, horizons):
    """Rows of settings by mean log ratio to tuned adamw, best first, by contender and horizon."""
    rows = []
    for horizon in horizons:
        best = {
            task: np.nanmin(found.valid[..., -1].mean(-1))
            for (task, name, h), found in curves.items()
            if name == "adamw" and h == horizon
        }
        for contender in made:
            tasks = [t for t in best if (t, contender.name, horizon) in curves]
            if not tasks:
                continue
            finals = np.stack(
                [curves[t, contender.name, horizon].valid[..., -1].mean(-1) for t in tasks]
            )  # (tasks, settings)
            finals = np.where(np.isfinite(finals), finals, 1e3)
            ratios = np.log(finals / np.array([best[t] for t in tasks])[:, None])
            for i in np.argsort(np.minimum(ratios, 2.0).mean(0)):
                rows.append(
                    {
                        "horizon": horizon,
                        "contender": contender.name,
                        "setting": np.asarray(contender.learning_rates[i]).tolist(),
                        "mean_log_ratio": float(ratios[:, i].mean()),
                        "wins": float((ratios[:, i] <= 0).mean()),
                        "by_task": {t: float(r) for t, r in zip(tasks, ratios[:, i], strict=True)},
                    }
                )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--contenders", default=None, help="comma-separated; default: all")
    parser.add_argument("--horizons", default="200,1000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--curves", default=None)
    parser.add_argument("--json", default=None)
    parser.add_argument("--show", type=int, default=4)
    arguments = parser.parse_args()
    every = contenders()
    names = arguments.contenders.split(",") if arguments.contenders else list(every)
    made = [every[name]() for name in names]
    horizons = [int(x) for x in arguments.horizons.split(",")]
    known = training_tasks()
    tasks = {name: known[name] for name in arguments.tasks.split(",")}
    curves = evaluate.run_curves(
        tasks, made, horizons, arguments.seeds, lambda text: print(text, flush=True),
        Path(arguments.curves) if arguments.curves else None, vary_content=True,
    )  # fmt: skip
    rows = summarise(curves, made, horizons)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows))
    counts = {}
    for row in rows:
        key = (row["horizon"], row["contender"])
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= arguments.show:
            print(
                f"{row['horizon']} {row['contender']:14} {row['setting']} mean log ratio "
                f"{row['mean_log_ratio']:+.3f} wins {row['wins']:.0%} "
                + " ".join(f"{t[:9]}{t[-5:]} {r:+.2f}" for t, r in row["by_task"].items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
