"""Training curves of every set of weights that ships, beside AdamW and Muon at five rates each.

    LOPT_JAX_DATA=outputs/data python benchmarks/gallery.py          # goes on where it stopped
    python benchmarks/gallery.py --draw                              # the pictures alone

Fashion-MNIST is prepared by `python -m lopt_jax.meta.prepare outputs/data fashion_mnist`. Learned
sets run as their cards recommend, AdamW and Muon as in the scale suite. Curves of a task and an
optimizer are kept in a folder as soon as they are there. The records go to
docs/benchmarks/gallery.json, and the pictures are drawn from these alone.
"""

import argparse
import datetime
import functools
import hashlib
import json
import time
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

import lopt_jax
from lopt_jax.meta import evaluate
from lopt_jax.meta.networks import Mlp
from lopt_jax.meta.scale import contenders as usual
from lopt_jax.meta.tasks import Pictures, SupervisedTask, cross_entropy, held_out_tasks
from lopt_jax.plot import COLOURS

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "benchmarks" / "gallery.json"
IMAGES = ROOT / "docs" / "images"
SEEDS = 3
SHIPPED = ("lopt", "celo2_small", "velo_small", "celo_small", "small_fc_lopt", "small_fc_lopt_h4")
FIRST = ("fashion_mlp", "bytes_transformer_32")  # on the first page
RATES = {
    "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "muon": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
}
# Meta-trained sets are drawn with these, since their colours alone are hard to tell apart.
DASHES = {
    "celo2_small": "--",
    "velo_small": "-.",
    "celo_small": ":",
    "small_fc_lopt": (0, (6, 2)),
    "small_fc_lopt_h4": (0, (3, 1, 1, 1, 1, 1)),
}
# name -> title and number of steps
TASKS = {
    "digits_mlp_128": ("Digits: MLP 64-128-10", 400),
    "fashion_mlp": ("Fashion-MNIST, 16 x 16: MLP 256-128-10", 400),
    "cancer_mlp_norm_64x3": ("Breast cancer: MLP with norms, 3 x 64", 200),
    "bytes_transformer_32": ("Bytes of Python: transformer, width 32", 200),
}


def tasks():
    """The tasks of `TASKS`, by name; meta-training saw none of them."""
    fashion = SupervisedTask(
        "fashion_mlp", Pictures("fashion_mnist", 16), Mlp((256, 128, 10)), cross_entropy, 128,
        activation=0, log_init_spread=0.0,
    )  # fmt: skip
    known = {**held_out_tasks(), fashion.name: fashion}
    return {name: known[name] for name in TASKS}


def contenders():
    """The sets that ship, as their cards recommend, and the usual optimizers with their rates."""
    lopt = evaluate.Contender(
        "lopt",
        lambda rate, steps: lopt_jax.lopt(steps, learning_rate=rate),
        (1.0,),
        digest=usual.LOPT.version(),
    )
    others = [evaluate.learned(name, lopt_jax.load_weights(name)) for name in SHIPPED[1:]]
    tuned = [
        evaluate.Contender(name, functools.partial(_tuned, contender), RATES[name])
        for name, contender in (("adamw", usual.ADAMW), ("muon", usual.MUON))
    ]
    return [lopt, *tuned, *others]


def _tuned(contender, rate, steps):
    return contender.build({"rate": rate}, steps)


def measure(folder):
    """Runs what the folder does not hold, and writes the records."""
    begin = time.perf_counter()
    say = lambda text: print(f"{time.perf_counter() - begin:5.0f} s {text}", flush=True)  # noqa: E731
    all_contenders = contenders()
    records = []
    for name, task in tasks().items():
        steps = TASKS[name][1]
        found = evaluate.run_curves(
            {name: task}, all_contenders, [steps], SEEDS, say, folder, ahead=1
        )
        for contender in all_contenders:
            curves = found[name, contender.name, steps]
            best = evaluate.best_rate(curves)
            finals = curves.valid[..., -1].mean(-1)
            records.append(
                {
                    "task": name,
                    "optimizer": contender.name,
                    "steps": steps,
                    "rates": list(contender.learning_rates),
                    "finals": [_short(x) for x in finals],
                    "rate": contender.learning_rates[best],
                    "at": [(i + 1) * steps // evaluate.POINTS for i in range(evaluate.POINTS)],
                    "valid": [[_short(x) for x in seed] for seed in curves.valid[best]],
                    "date": datetime.date.today().isoformat(),
                    "jax": jax.__version__,
                    "device": jax.devices()[0].device_kind,
                }
            )
    RECORDS.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")


def _short(number):
    """Four digits; None where it is not finite."""
    return float(f"{number:.4g}") if np.isfinite(number) else None


def read():
    """The records."""
    return json.loads(RECORDS.read_text())


def table(records):
    """A Markdown table of final losses: a row a task, a column an optimizer."""
    names = list(dict.fromkeys(r["optimizer"] for r in records))
    lines = ["| task | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for task, (title, _) in TASKS.items():
        here = {r["optimizer"]: r for r in records if r["task"] == task}
        title = f"{title}; {here[names[0]]['steps']} steps"
        lines.append(f"| {title} | " + " | ".join(_cell(here[name]) for name in names) + " |")
    return "\n".join(lines)


def _cell(record):
    last = [np.inf if seed[-1] is None else seed[-1] for seed in record["valid"]]
    end = "*" if record["rate"] in (record["rates"][0], record["rates"][-1]) else ""
    rate = f" ({record['rate']:.2g}{end})" if len(record["rates"]) > 1 else ""
    return f"{np.mean(last):.3g} ±{np.std(last):.1g}{rate}"


def draw(records):
    """The pictures: one a task of all optimizers, and two small ones for the first page."""
    for task, (title, _) in TASKS.items():
        here = [r for r in records if r["task"] == task]
        _picture(here, title, IMAGES / f"gallery_{task}.png")
        first = [r for r in here if r["optimizer"] in ("lopt", "adamw", "muon")]
        if task in FIRST:
            _picture(first, title, IMAGES / f"first_{task}.png")


def _picture(records, title, path):
    mpl.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(5.6, 4.2), layout="constrained")
        for record in records:
            name, seeds = record["optimizer"], np.asarray(record["valid"], float)
            label = name + (f", best of {len(record['rates'])} rates" if name in RATES else "")
            mean = seeds.mean(0)
            width = 2.4 if name == "lopt" else 1.4
            style = {"linewidth": width, "linestyle": DASHES.get(name, "-")}
            axes.plot(record["at"], mean, color=COLOURS[name], label=label, **style)
            spread = (seeds.min(0), seeds.max(0))
            axes.fill_between(record["at"], *spread, color=COLOURS[name], alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="step", ylabel="held-out loss (nats)", yscale="log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=_ticks(high / low)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        columns = 2 if len(records) > 3 else 1
        axes.legend(frameon=False, fontsize=9, ncols=columns, handlelength=2.8)
        figure.savefig(path, dpi=110, metadata={"Comment": digest()})
        pyplot.close(figure)


def _ticks(span):
    """Which multiples of powers of ten get a number, by the axis' largest value over its least."""
    if span > 12:
        return (1.0, 2.0, 5.0)
    return (1.0, 1.5, 2.0, 3.0, 4.0, 6.0) if span > 2 else tuple(np.arange(1.0, 10.0, 0.25))


def digest():
    """Of the records: every picture has it, so a test finds pictures of other records."""
    return hashlib.sha256(RECORDS.read_bytes()).hexdigest()


def main():
    """Measures and draws, or draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw the records that there are")
    parser.add_argument(
        "--curves", type=Path, default=Path("outputs/gallery"), help="the folder of kept curves"
    )
    options = parser.parse_args()
    if not options.draw:
        measure(options.curves)
    draw(read())


if __name__ == "__main__":
    main()
