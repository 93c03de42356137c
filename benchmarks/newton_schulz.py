"""Newton-Schulz: accuracy of the singular values and milliseconds of each variant; see `--help`.

python benchmarks/newton_schulz.py

Steps of one shape are orthogonalised together. "rms error" is that of the result beside the same
polynomials in float64, over singular values that fall to a hundredth; "singular values" are the
least and the largest of the result. The times are of the product alone, beside
`optax.contrib.muon`'s own function on bfloat16 arrays.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import _muon

from lopt_jax.rules.newton_schulz import (
    QUINTIC,
    Coefficients,
    gram_blocks,
    newton_schulz,
    operations,
    polar_express,
)

COEFFICIENTS = {
    "quintic": QUINTIC,
    "polar express, 1.01": polar_express(5),
    "polar express, 1.05": polar_express(5, safety=1.05),
}
_SECONDS = 0.15  # of one timing


class Variant(NamedTuple):
    """One way to orthogonalise; rows of the table."""

    form: str
    precision: str
    coefficients: str
    run: Callable[[jax.Array], jax.Array]


def variants(precisions: Sequence[str]) -> list[Variant]:
    """All that are measured."""
    out = [
        Variant(
            form,
            precision,
            name,
            functools.partial(
                newton_schulz, coefficients=coefficients, precision=precision, form=form
            ),
        )
        for precision in precisions
        for form in ("matrix", "gram")
        for name, coefficients in COEFFICIENTS.items()
        if name == "quintic" or (precision == "bfloat16" and form == "gram")
    ]
    return [*out, Variant("optax", "bfloat16", "quintic", _optax)]


def _optax(x: jax.Array) -> jax.Array:
    dimensions = _muon.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return _muon.orthogonalize_via_newton_schulz(
        x.astype(jnp.bfloat16),
        jnp.asarray(QUINTIC[0], jnp.bfloat16),
        ns_steps=len(QUINTIC),
        dimension_numbers=dimensions,
    ).astype(x.dtype)


def accuracy(variant: Variant, shape: tuple[int, int]) -> tuple[float, float, float]:
    """Relative error, least and largest singular value, of a matrix of known singular vectors."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    values = np.geomspace(1, 1e-2, min(shape))
    values /= np.linalg.norm(values)
    expected = values
    for a, b, c in _coefficients(variant):
        expected = a * expected + b * expected**3 + c * expected**5
    got = np.float64(jax.jit(variant.run)(jnp.float32((u * values) @ v)))
    singular_values = np.linalg.svd(got, compute_uv=False)
    error = np.linalg.norm(got - (u * expected) @ v) / np.linalg.norm(expected)
    return float(error), float(singular_values[-1]), float(singular_values[0])


def _coefficients(variant: Variant) -> Coefficients:
    return COEFFICIENTS[variant.coefficients]


def milliseconds(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[float, float]:
    """Milliseconds of a call, the median of five timings, and seconds to compile."""
    start = time.perf_counter()
    compiled = jax.jit(run).lower(x).compile()
    compile_s = time.perf_counter() - start

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out: Any = compiled(x)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = max(1, int(_SECONDS / seconds(1)))
    return 1e3 * statistics.median(seconds(calls) for _ in range(5)), compile_s


def measure(
    shapes: Sequence[tuple[int, int, int]], checked: tuple[int, int], precisions: Sequence[str]
) -> list[tuple[str, ...]]:
    """The rows of the table: of every shape, each variant.

    Args:
      shapes: matrices of a batch, rows and columns.
      checked: rows and columns of the matrix whose singular values are looked at.
      precisions: as `newton_schulz`'s.

    Returns:
      The rows.
    """
    rows = []
    known: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for shape in shapes:
        x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
        for variant in variants(precisions):
            short, long = sorted(shape[1:])
            steps = len(_coefficients(variant))
            blocks = gram_blocks(short, long, steps) if variant.form == "gram" else (1,) * steps
            if (
                variant.form == "gram"
                and blocks == (1,) * steps
                and variant.coefficients == "quintic"
            ):
                continue  # the same program as on matrices
            ms, compile_s = milliseconds(variant.run, x)
            if variant[:3] not in known:
                known[variant[:3]] = accuracy(variant, checked)
            error, least, largest = known[variant[:3]]
            done = 2 * shape[0] * operations(short, long, blocks)
            rows.append(
                (
                    "x".join(map(str, shape)),
                    *variant[:3],
                    f"{error:.1e}",
                    f"{least:.3f} to {largest:.3f}",
                    f"{ms:.3f}",
                    f"{done / ms / 1e9:.1f}",
                    f"{compile_s:.1f}",
                )
            )
            print(" | ".join(rows[-1]), flush=True)
    return rows


_COLUMNS = (
    "matrices",
    "form",
    "precision",
    "coefficients",
    "rms error",
    "singular values",
    "ms",
    "TFLOP/s",
    "compile s",
)


def main() -> None:
    """Measures and prints a table."""
    is_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape = lambda text: tuple(map(int, text.split("x")))  # noqa: E731
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        default=[(1, 512, 2048), (24, 256, 1024)]
        if is_cpu
        else [
            (24, 1024, 1024),
            (24, 1024, 3072),
            (24, 1024, 4096),
            (8, 1024, 4096),
            (144, 256, 256),
        ],
        metavar="BATCHxROWSxCOLUMNS",
    )
    parser.add_argument(
        "--checked",
        type=shape,
        default=(128, 512),
        metavar="ROWSxCOLUMNS",
        help="the matrix whose singular values are looked at",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=["highest"] if is_cpu else ["bfloat16", "highest"],
    )
    options = parser.parse_args()
    rows = measure(options.shapes, options.checked, options.precisions)
    device = jax.devices()[0].device_kind
    print(f"\n{device}, jax {jax.__version__}\n\n| {' | '.join(_COLUMNS)} |")
    print("| --- | --- | --- | --- |" + " ---: |" * (len(_COLUMNS) - 4))
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
