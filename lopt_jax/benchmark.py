"""Milliseconds a step of every optimizer, beside optax.adamw and a plain copy, in one run.

Behind `lopt bench` and `benchmarks/step_time.py`. What is timed is the optimizer's update alone,
compiled, with the state donated. All variants of a model take turns, so that other work on the
machine slows all of them alike; what counts are ratios within one run.
"""

import argparse
import datetime
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt_jax.checks import check_fields, check_value
from lopt_jax.cli import positive_integer
from lopt_jax.optimizers.celo import celo
from lopt_jax.optimizers.celo2 import celo2, celo2_base
from lopt_jax.optimizers.elo_celo2 import elo_celo2
from lopt_jax.optimizers.lopt import lopt
from lopt_jax.optimizers.matrices import plans_of
from lopt_jax.optimizers.plans import ADAMW, LEARNED, Matrix, celo2_plans
from lopt_jax.optimizers.small_fc_lopt import small_fc_lopt
from lopt_jax.optimizers.velo import velo
from lopt_jax.packing import packed
from lopt_jax.weights import Weights
from lopt_jax.weights.schema import expected_shapes

Shapes = dict[str, tuple[int, ...]]

BACKENDS = ("xla", "auto", "pallas")  # in the tables' order

# Of one timing; shorter steps are repeated within it, and nothing waits for them in between: the
# host hands out the next step while a GPU works, as in any training loop. What passes until the
# first step reaches the GPU is part of the time: of whole training steps, take more of them.
_MINIMUM_SECONDS = 0.25


@dataclass(frozen=True)
class Record:
    """One row of the results; None where it was not measured."""

    model: str
    optimizer: str
    backend: str
    dtype: str
    ms: float | None  # median milliseconds a step
    copy_fraction: float | None  # bytes/s that the step needs at least, over a plain copy's
    compile_s: float
    temp_bytes: int
    device: str
    jax: str
    date: str
    trace_s: float | None = None  # part of compile_s: tracing and lowering
    busy_ms: float | None = None  # milliseconds a step that a GPU works, from its profiler
    launches: float | None = None  # kernels and copies that it runs a step
    step: str = "update"  # what a step is: the update alone, or "train": gradients and all


@dataclass(frozen=True)
class Optimizer:
    """One optimizer of the benchmark.

    Attributes:
      make: builds it for a backend.
      bytes_per_parameter: least bytes that a step moves, from the bytes of one parameter.
      backends: those that it has.
    """

    make: Callable[[str], optax.GradientTransformationExtraArgs]
    bytes_per_parameter: Callable[[int], int]
    backends: tuple[str, ...] = BACKENDS


# -- the models' parameter lists ----------------------------------------------------------------


def mlp_shapes() -> Shapes:
    """The 6 tensors (0.67M parameters) of an MLP for MNIST, 784-512-512-10."""
    layers = enumerate(itertools.pairwise((784, 512, 512, 10)))
    return {f"{kind}_{i}": s for i, (a, b) in layers for kind, s in (("w", (a, b)), ("b", (b,)))}


def _transformer_shapes(layers: int, width: int) -> Shapes:
    """Pre-norm blocks of 12 tensors with fused query, key and value, and the last norm."""
    norm = {"scale": (width,), "bias": (width,)}
    block = {
        **{f"norm_1_{k}": v for k, v in norm.items()},
        **{f"norm_2_{k}": v for k, v in norm.items()},
        "qkv_w": (width, 3 * width),
        "qkv_b": (3 * width,),
        "out_w": (width, width),
        "out_b": (width,),
        "up_w": (width, 4 * width),
        "up_b": (4 * width,),
        "down_w": (4 * width, width),
        "down_b": (width,),
    }
    blocks = {f"block_{i}_{k}": shape for i in range(layers) for k, shape in block.items()}
    return {**blocks, **{f"norm_{k}": v for k, v in norm.items()}}


def vit_b16_shapes() -> Shapes:
    """The 152 tensors (86.6M parameters) of ViT-B/16 with 1000 classes."""
    return {
        "patches_w": (16, 16, 3, 768),
        "patches_b": (768,),
        "cls": (1, 1, 768),
        "positions": (1, 197, 768),
        **_transformer_shapes(12, 768),
        "head_w": (768, 1000),
        "head_b": (1000,),
    }


def gpt2_355m_shapes() -> Shapes:
    """The 292 tensors (354.8M parameters) of the 24-layer GPT-2."""
    return {"wte": (50257, 1024), "wpe": (1024, 1024), **_transformer_shapes(24, 1024)}


MODELS: dict[str, Callable[[], Shapes]] = {
    "mlp": mlp_shapes,
    "vit_b16": vit_b16_shapes,
    "gpt2_355m": gpt2_355m_shapes,
}


# -- the optimizers -----------------------------------------------------------------------------


def random_weights(architecture: str, **config: Any) -> Weights:
    """Random weights, which take as long as any others.

    Args:
      architecture: for example "velo".
      **config: what differs from the architecture's defaults.

    Returns:
      The weights.
    """
    shapes, treedef = jax.tree.flatten(
        expected_shapes(architecture, config), is_leaf=lambda x: isinstance(x, tuple)
    )
    generator = np.random.default_rng(0)
    arrays = [0.01 * generator.standard_normal(shape, np.float32) for shape in shapes]
    return Weights(architecture, config, treedef.unflatten(arrays))


def _adamw(backend: str) -> optax.GradientTransformationExtraArgs:
    del backend
    return optax.with_extra_args_support(optax.adamw(1e-3))


def _velo(backend: str) -> optax.GradientTransformationExtraArgs:
    return velo(10_000, random_weights("velo"), backend=backend)


def _celo(backend: str) -> optax.GradientTransformationExtraArgs:
    return celo(10_000, random_weights("celo"), backend=backend)


def _small_fc_lopt(hidden: int) -> Callable[[str], optax.GradientTransformationExtraArgs]:
    return lambda backend: small_fc_lopt(
        random_weights("small_fc_lopt", hidden_size=hidden), backend=backend
    )


_EMBEDDINGS_AND_HEADS = ("wte", "wpe", "cls", "positions", "head")  # parts of their names


def label(path: Any, leaf: Any) -> str:
    """For the optimizers of matrices: which leaves of the models AdamW updates."""
    del leaf
    name = jax.tree_util.keystr(path)
    return ADAMW if any(part in name for part in _EMBEDDINGS_AND_HEADS) else LEARNED


def matrix_axes(path: Any, leaf: Any) -> Matrix | None:
    """Where the matrices of the models are: in kernels of convolutions not the last two axes."""
    return Matrix((-4, -3, -2), (-1,)) if leaf.ndim == 4 else None


def _of_matrices(
    constructor: Callable[..., optax.GradientTransformationExtraArgs], architecture: str
) -> Callable[[str], optax.GradientTransformationExtraArgs]:
    return lambda backend: constructor(
        1e-3,
        random_weights(architecture),
        label_fn=label,
        matrix_axes=matrix_axes,
        backend=backend,
    )


def _muon(backend: str) -> optax.GradientTransformationExtraArgs:
    """Muon with the matrices that `celo2` has here."""
    del backend

    def dimensions(params: Any) -> Any:
        plans = plans_of(celo2_plans(label, matrix_axes), params, None)
        numbers = [
            optax.contrib.MuonDimensionNumbers(*plan.matrix) if plan.rule == LEARNED else None
            for plan in plans
        ]
        return jax.tree.unflatten(jax.tree.structure(params), numbers)

    muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2)
    return optax.with_extra_args_support(muon)


def _label_of_matrices(path: Any, leaf: Any) -> Any:
    """For `lopt`, which finds the labels of vectors itself: `label` of everything else."""
    return label(path, leaf) if leaf.ndim >= 2 else None


def _lopt(backend: str) -> optax.GradientTransformationExtraArgs:
    return lopt(10_000, label_fn=_label_of_matrices, backend=backend)


# Bytes, with three momenta and one second moment in float32: the first pass reads the gradient
# (VeLO's also the parameter), the second gradient, parameter and accumulators, the third the same
# again, and writes accumulators and update. Of the optimizers of matrices these are the bytes of
# matrices without what orthogonalisation moves, for which there is no such least number.
OPTIMIZERS = {
    "optax.adamw": Optimizer(_adamw, lambda size: 7 * size, ("xla",)),
    "velo": Optimizer(_velo, lambda size: 7 * size + 48),
    "celo": Optimizer(_celo, lambda size: 7 * size + 48),
    "small_fc_lopt_h4": Optimizer(_small_fc_lopt(4), lambda size: 6 * size + 48),
    "small_fc_lopt_h32": Optimizer(_small_fc_lopt(32), lambda size: 6 * size + 48),
    "lopt": Optimizer(_lopt, lambda size: 6 * size + 48),
    "celo2": Optimizer(_of_matrices(celo2, "celo2"), lambda size: 6 * size + 48),
    "celo2_base": Optimizer(_of_matrices(celo2_base, "celo2"), lambda size: 6 * size + 48),
    "elo_celo2": Optimizer(_of_matrices(elo_celo2, "elo_celo2"), lambda size: 6 * size + 48),
    "optax.contrib.muon": Optimizer(_muon, lambda size: 4 * size, ("xla",)),
}


def _packed(optimizer: Optimizer) -> Optimizer:
    return replace(optimizer, make=lambda backend: packed(optimizer.make(backend)))


OPTIMIZERS |= {f"{name}_packed": _packed(optimizer) for name, optimizer in OPTIMIZERS.items()}
DEFAULT_OPTIMIZERS = tuple(name for name in OPTIMIZERS if not name.endswith("_packed"))


# -- measuring ----------------------------------------------------------------------------------


class Variant:
    """A compiled step with its arguments, ready to be timed in turns with others."""

    def __init__(
        self,
        run: Callable[[int], Any],
        compile_s: float = 0.0,
        trace_s: float = 0.0,
        temp_bytes: int = 0,
    ):
        self.run = run  # runs step number i, returns arrays to wait for
        self.compile_s = compile_s
        self.trace_s = trace_s
        self.temp_bytes = temp_bytes
        self.inner = 1
        self.seconds: list[float] = []
        self.busy_ms: float | None = None
        self.launches: float | None = None

    def time(self) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        out = None
        for i in range(self.inner):
            out = self.run(i)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / self.inner

    def profile(self, steps: int = 3) -> None:
        """Finds out how long a GPU works in a step, if there is one."""
        events = gpu_events(lambda: [self.run(i) for i in range(steps)])
        if events:
            self.busy_ms, self.launches = busy_ms(events) / steps, len(events) / steps


class GpuEvent(NamedTuple):
    """A kernel or copy that a GPU ran; times in nanoseconds."""

    name: str
    start: float
    end: float
    device: str


def gpu_events(run: Callable[[], Any]) -> list[GpuEvent]:
    """What GPUs run, from their profiler.

    Args:
      run: returns arrays to wait for.

    Returns:
      Every kernel and copy; none without a GPU.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    return [
        GpuEvent(event.name, event.start_ns, event.start_ns + event.duration_ns, plane.name)
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]


def busy_ms(events: Sequence[GpuEvent]) -> float:
    """Milliseconds that a GPU works, the mean over GPUs."""
    busy = 0.0
    devices = {event.device for event in events}
    for device in devices:
        end = 0.0
        for event in sorted((e for e in events if e.device == device), key=lambda e: e.start):
            busy += max(0.0, event.end - max(event.start, end))
            end = max(end, event.end)
    return busy / 1e6 / len(devices)


def compile_step(step: Callable, arguments: Sequence[Any], donate: Any) -> tuple[Any, Variant]:
    """Compiles a step.

    Args:
      step: the function.
      arguments: its arguments, or their shapes and dtypes.
      donate: positions of those that are donated.

    Returns:
      The compiled function, and a variant that holds what compiling it took, but cannot run.
    """
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=donate).lower(*arguments)
    trace_s = time.perf_counter() - start
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temp_bytes = 0 if memory is None else memory.temp_size_in_bytes
    return compiled, Variant(lambda i: None, compile_s, trace_s, temp_bytes)


def _optimizer_variant(
    tx: optax.GradientTransformationExtraArgs, params: Any, gradients: Sequence[Any], run: bool
) -> Variant:
    def step(state: Any, gradients: Any, params: Any, loss: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params, value=loss)
        return state, updates  # in this order the donated state is written in place

    loss = jax.ShapeDtypeStruct((), jnp.float32)
    abstract = jax.eval_shape(tx.init, params)
    compiled, variant = compile_step(step, (abstract, params, params, loss), donate=0)
    state = [tx.init(params)] if run else []
    losses = [jnp.float32(1.0), jnp.float32(0.9)]

    def run_step(i: int) -> Any:
        state[0], updates = compiled(state[0], gradients[i % 2], params, losses[i % 2])
        return updates

    variant.run = run_step
    return variant


def _copy_variant(elements: int, dtype: Any) -> Variant:
    x = jax.random.normal(jax.random.key(0), (elements,), dtype)
    compiled, variant = compile_step(lambda x: x + 1, (x,), donate=())
    variant.run = lambda i: compiled(x)
    return variant


def _random_tree(shapes: Any, seed: int) -> Any:
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = jax.jit(
        lambda key, like: 0.02 * jax.random.normal(key, like.shape, like.dtype), static_argnums=1
    )
    return treedef.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=True)])


def measure(
    model: str,
    optimizers: Sequence[str],
    backends: Sequence[str],
    *,
    dtype: str = "float32",
    repetitions: int = 20,
    compile_only: bool = False,
    report: Callable[[str], None] = print,
) -> list[Record]:
    """Measures optimizers on one model's parameter list.

    Args:
      model: a key of `MODELS`.
      optimizers: keys of `OPTIMIZERS`, "NAME:BACKEND" where it is not to be all of the backends.
      backends: "xla", "auto", "pallas"; a backend that cannot run here is reported and left out.
      dtype: of parameters and gradients.
      repetitions: timings of each variant.
      compile_only: only compile: nothing as large as the model is allocated.
      report: takes a line of progress.

    Returns:
      A record a variant; first that of the plain copy of as many bytes as the parameters have.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for name, shape in MODELS[model]().items()
    }
    elements = sum(math.prod(x.shape) for x in shapes.values())
    itemsize = jnp.dtype(dtype).itemsize
    params: Any = shapes
    gradients: list[Any] = []
    variants: dict[tuple[str, str], Variant] = {}
    if not compile_only:
        params = _random_tree(shapes, 0)
        gradients = [_random_tree(shapes, seed) for seed in (1, 2)]
        variants[("copy", "xla")] = _copy_variant(elements, dtype)
    for name, _, own in (named.partition(":") for named in optimizers):
        for backend in OPTIMIZERS[name].backends:
            wanted = [own] if own else backends
            if backend not in wanted and len(OPTIMIZERS[name].backends) > 1:
                continue
            try:
                variants[(name, backend)] = _optimizer_variant(
                    OPTIMIZERS[name].make(backend), params, gradients, not compile_only
                )
            except NotImplementedError as error:
                report(f"{model}: {name} on {backend} left out: {error}")
            else:
                seconds = variants[(name, backend)].compile_s
                report(f"{model}: {name} on {backend} compiled in {seconds:.1f} s")
    if not compile_only:
        take_turns(list(variants.values()), repetitions)
    return _records(model, variants, dtype, elements, itemsize)


def take_turns(
    variants: Sequence[Variant], repetitions: int, seconds: float = _MINIMUM_SECONDS
) -> None:
    """Times variants, one after another, again and again.

    Args:
      variants: these; each gets its timings.
      repetitions: timings of each.
      seconds: that one timing takes at least, of as many steps as that needs.
    """
    for variant in variants:
        variant.time()  # the first call is not like the others
        variant.inner = max(1, math.ceil(seconds / variant.time()))
    for _ in range(repetitions):
        for variant in variants:
            variant.seconds.append(variant.time())
    if jax.default_backend() == "gpu":
        for variant in variants:
            variant.profile()


def _records(
    model: str,
    variants: dict[tuple[str, str], Variant],
    dtype: str,
    elements: int,
    itemsize: int,
) -> list[Record]:
    copy = variants.get(("copy", "xla"))
    copy_rate = None if copy is None else 2 * itemsize / statistics.median(copy.seconds)
    out = []
    for (name, backend), variant in variants.items():
        ms = fraction = None
        if copy_rate is not None:
            seconds = statistics.median(variant.seconds)
            moved = (
                2 * itemsize if name == "copy" else OPTIMIZERS[name].bytes_per_parameter(itemsize)
            )
            ms, fraction = 1e3 * seconds, moved / seconds / copy_rate
        out.append(record_of(variant, model, name, backend, dtype, ms, fraction))
    return out


def record_of(
    variant: Variant,
    model: str,
    optimizer: str,
    backend: str,
    dtype: str,
    ms: float | None,
    copy_fraction: float | None,
    step: str = "update",
) -> Record:
    """The record of a variant; see `Record`."""
    return Record(
        model=model,
        optimizer=optimizer,
        backend=backend,
        dtype=dtype,
        ms=ms,
        copy_fraction=copy_fraction,
        compile_s=variant.compile_s,
        temp_bytes=variant.temp_bytes,
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        trace_s=variant.trace_s,
        busy_ms=variant.busy_ms,
        launches=variant.launches,
        step=step,
    )


# -- command line -------------------------------------------------------------------------------


def _optimizer(named: str) -> str:
    name, _, backend = named.partition(":")
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise argparse.ArgumentTypeError(f"expected one of {known}; found {name!r}")
    backends = OPTIMIZERS[name].backends
    if backend not in ("", *backends):
        raise argparse.ArgumentTypeError(
            f"{name}: expected a backend out of {', '.join(backends)}; found {backend!r}"
        )
    return named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options to a parser."""
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=["mlp"] if on_cpu else list(MODELS),
        help="parameter lists; the large ones want a GPU (default here: %(default)s)",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        type=_optimizer,
        default=DEFAULT_OPTIMIZERS,
        metavar="NAME[:BACKEND]",
        help=f"of {', '.join(OPTIMIZERS)}",
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=["xla"] if on_cpu else ["xla", "auto"],
        help="implementations of the learned rules (default here: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of parameters and gradients (default: %(default)s)",
    )
    parser.add_argument(
        "--repetitions",
        type=positive_integer,
        default=20,
        help="timings of each variant (default: %(default)s)",
    )
    parser.add_argument("--compile-only", action="store_true", help="compile, do not run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print a file's records as Markdown; run nothing"
    )


def read_records(path: Path) -> list[Record]:
    """Reads the records that `--json` wrote.

    Args:
      path: of the file.

    Returns:
      The records.

    Raises:
      ValueError: for a file that holds something else or none, naming it.
    """
    try:
        rows = json.loads(path.read_text())
        check_value("records", rows, tuple[dict, ...])
        records = [Record(**row) for row in rows]
        for record in records:
            check_fields(record)
        if not records:
            raise ValueError("there are none")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected records of `bench --json`: {error}") from error
    return records


def add_commands(commands: Any) -> None:
    """Registers `lopt bench`."""
    parser = commands.add_parser("bench", help="measure milliseconds a step of each optimizer")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures what the options ask for, prints a table and writes the records."""
    if options.show is not None:
        print(markdown(read_records(options.show)))
        return 0
    records: list[Record] = []
    for model in options.models:
        records += measure(
            model,
            options.optimizers,
            options.backends,
            dtype=options.dtype,
            repetitions=options.repetitions,
            compile_only=options.compile_only,
        )
        if options.json is not None:  # after every model: a long run that is cut short keeps some
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")
    print_table(records)
    return 0


_COLUMNS = (
    "model",
    "optimizer",
    "backend",
    "ms a step",
    "times adamw",
    "of a copy's speed",
    "GPU busy ms",
    "launches",
    "compile s",
    "temporary MB",
)


def _rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    number = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
    adamw: dict[tuple[str, str], float | None] = {}  # the last one: files join several processes
    rows: list[tuple[str, ...]] = []
    for r in records:
        if r.optimizer == "optax.adamw":
            adamw[r.model, r.step] = r.ms
        base = adamw.get((r.model, r.step))
        ratio = None if r.ms is None or base is None else r.ms / base
        rows.append(
            (
                r.model,
                r.optimizer,
                r.backend,
                number(r.ms, ".3f"),
                number(ratio, ".2f"),
                number(r.copy_fraction, ".0%"),
                number(r.busy_ms, ".3f"),
                number(r.launches, ".0f"),
                f"{r.compile_s:.1f}",
                f"{r.temp_bytes / 1e6:.1f}",
            )
        )
    return rows


def _title(records: Sequence[Record]) -> str:
    first = records[0]
    return f"{first.device}, jax {first.jax}, {first.dtype}, {first.date}"


def markdown(records: Sequence[Record]) -> str:
    """The records as a Markdown table, with each time as a multiple of optax.adamw's."""
    rows = _rows(records)
    shown = _shown(rows)
    line = lambda cells: f"| {' | '.join(cells[i] for i in shown)} |"  # noqa: E731
    lines = [line(_COLUMNS), "| --- | --- | --- |" + " ---: |" * (len(shown) - 3)]
    lines += map(line, rows)
    return f"{_title(records)}\n\n" + "\n".join(lines)


def _shown(rows: Sequence[tuple[str, ...]]) -> list[int]:
    """The columns in which any row has something."""
    return [i for i in range(len(_COLUMNS)) if any(row[i] for row in rows)]


def print_table(records: Sequence[Record]) -> None:
    """Prints the records, with each time as a multiple of optax.adamw's on the same model."""
    from rich.console import Console
    from rich.table import Table

    if not records:
        return
    rows = _rows(records)
    table = Table(title=_title(records))
    for i in _shown(rows):
        table.add_column(_COLUMNS[i], justify="left" if i < 3 else "right")
    for row in rows:
        table.add_row(*(row[i] for i in _shown(rows)))
    Console(width=150).print(table)
