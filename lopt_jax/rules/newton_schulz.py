"""Newton-Schulz: nearly orthogonal matrices with the singular vectors of given ones, by products.

An iteration is x -> (a + b g + c g g) x for g = x x': every singular value s becomes
a s + b s^3 + c s^5.

Where rows are few, several iterations are taken on the Gram matrix g alone (rows x rows), and their
factors multiplied, before the whole matrix is touched. After every second one g is made anew: what
rounding to bfloat16 makes of eigenvalues near zero, negative ones too, would else grow without
bound.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.compiler.precision import product_precision
from lopt_jax.context import Tracing

Coefficients = Sequence[tuple[float, float, float]]  # (a, b, c) of each iteration, c not zero
Form = Literal["auto", "matrix", "gram"]

PRECISIONS = ("auto", "bfloat16", "default", "high", "highest")

QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5  # of Muon: to between 0.68 and 1.21

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_EPSILON = 1e-8  # added to the norm
_CONSTANT_DIAGONAL = 256  # rows of at most so large a matrix as a constant of the program
_ON_GRAM = 2  # iterations on one Gram matrix
_TENSOR_CORES = 8.0  # the least CUDA compute capability whose matrix units take bfloat16


def polar_express(steps: int = 5, safety: float = 1.01) -> Coefficients:
    """The polynomials whose composition brings all singular values in [1e-3, 1] nearest to one.

    Args:
      steps: how many.
      safety: every polynomial but the last of all takes its argument divided by this, so that
        rounding errors stay where the next one is small. 1.01 is the publication's; in bfloat16,
        1.05 ends nearer.

    Returns:
      The coefficients of each.

    Reference:
      Amsel et al., "The Polar Express", arXiv 2505.16932, algorithm 1: of degree 5.
    """
    safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in _POLAR_EXPRESS[:-1]]
    last = _POLAR_EXPRESS[-1]
    return (*safe[:steps], *[last] * (steps - len(safe)))


def newton_schulz(
    x: jax.Array,
    *,
    coefficients: Coefficients = QUINTIC,
    precision: str = "highest",
    form: Form = "auto",
    tracing: Tracing = Tracing(),  # noqa: B008 (frozen)
) -> jax.Array:
    """Nearly orthogonal matrices with the singular vectors of the given ones.

    Args:
      x: (..., m, n), float32 or wider: matrices. Each is divided by its Frobenius norm first.
      coefficients: of each iteration.
      precision: of the products. "highest", "high" and "default" as `lopt_jax.small_fc_lopt`'s;
        "bfloat16": arrays are bfloat16, sums inside of a product float32; "auto": that where the
        device has matrix units for it, else "highest". float64 is as if "highest" was given.
      form: "matrix": every iteration on the whole matrix; "gram": on its Gram matrix where that is
        fewer operations; "auto": that for bfloat16 alone, as float32 is there for parity.
      tracing: for which device.

    Returns:
      (..., m, n), dtype of x. Zeros stay zeros.

    Raises:
      ValueError: precision or form is none of these.

    Reference:
      Jordan et al., "Muon" (2024); optax, `contrib/_muon.py`, for coefficients and normalisation.
    """
    if form not in ("auto", "matrix", "gram"):
        raise ValueError(f"form: expected 'auto', 'matrix' or 'gram', found {form!r}.")
    if not x.size:
        return x
    chosen = "highest" if x.dtype == jnp.float64 else precision_on(tracing, precision)
    in_bfloat16 = chosen == "bfloat16"
    of_products = chosen
    if not in_bfloat16:
        precision_of_jax = jax.lax.Precision(chosen)
        of_products = product_precision(precision_of_jax, x.dtype, tracing.platform)
    short, long = sorted(x.shape[-2:])
    on_gram = form == "gram" or (form == "auto" and in_bfloat16)
    blocks = gram_blocks(short, long, len(coefficients)) if on_gram else (1,) * len(coefficients)

    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    y = x / (norm + _EPSILON)
    if in_bfloat16:
        y = y.astype(jnp.bfloat16)
    first = 0
    for steps in blocks:
        y = _iterations(y, coefficients[first : first + steps], of_products)
        first += steps
    return y.astype(x.dtype)


def check_precision(precision: Any) -> str:
    """The precision, or a ValueError naming the argument."""
    if precision not in PRECISIONS:
        expected = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision: expected one of {expected}; found {precision!r}.")
    return precision


def precision_on(tracing: Tracing, precision: str) -> str:
    """What "auto" is on the device that runs what is traced; others as they are."""
    if check_precision(precision) != "auto":
        return precision
    if tracing.platform == "gpu":
        capability = str(getattr(tracing.runs_on, "compute_capability", ""))
        is_number = capability.replace(".", "", 1).isdigit()  # CUDA's; ROCm has names there
        return "bfloat16" if not is_number or float(capability) >= _TENSOR_CORES else "highest"
    return "bfloat16" if tracing.platform == "tpu" else "highest"


def gram_blocks(short: int, long: int, steps: int) -> tuple[int, ...]:
    """How many iterations are taken on each Gram matrix: one, unless more are fewer operations.

    Args:
      short: the shorter side of a matrix.
      long: the longer side.
      steps: iterations in all.

    Returns:
      Numbers whose sum is `steps`.
    """
    full, rest = divmod(steps, _ON_GRAM)
    on_gram, on_matrix = (_ON_GRAM,) * full + (rest,) * (rest > 0), (1,) * steps
    return min(on_matrix, on_gram, key=lambda blocks: operations(short, long, blocks))


def operations(short: int, long: int, blocks: Sequence[int]) -> int:
    """Multiplications of one matrix; each is followed by an addition."""
    whole = short * short * long
    return sum(2 * whole + (4 * steps - 3) * short**3 for steps in blocks)


def _iterations(y: jax.Array, coefficients: Coefficients, precision: Any) -> jax.Array:
    """Some iterations on matrices (..., m, n), on one Gram matrix.

    The precision is "bfloat16" or one that XLA's products take.
    """
    product = functools.partial(_product, precision)
    rows_are_short = y.shape[-2] <= y.shape[-1]
    transposed = jnp.swapaxes(y, -2, -1)
    gram = product(y, transposed) if rows_are_short else product(transposed, y)
    total: Any = None  # what the iterations so far multiply the matrix by
    for left, of_iteration in zip(reversed(range(len(coefficients))), coefficients, strict=True):
        factor = _factor(gram, of_iteration, precision)
        total = factor if total is None else product(factor, total)
        if left:
            gram = product(factor, product(gram, factor))
    return product(total, y) if rows_are_short else product(y, total)


def _factor(gram: jax.Array, coefficients: tuple[float, float, float], precision: Any) -> jax.Array:
    """The polynomial a + b g + c g g of matrices (..., m, m), in their dtype."""
    a, b, c = coefficients
    size = gram.shape[-1]
    if precision == "bfloat16":  # in float32, and rounded once: one kernel beside the product's
        square = jnp.matmul(gram, gram, preferred_element_type=jnp.float32)
        diagonal = jnp.eye(size, dtype=jnp.float32)
        return (a * diagonal + b * gram + c * square).astype(gram.dtype)
    # The square completed, it is a product with a number added to the diagonal before and after.
    # Where that is a constant, not made of an iota, XLA's GPU backend takes it into the products.
    diagonal = (np if size <= _CONSTANT_DIAGONAL else jnp).eye(size, dtype=gram.dtype)
    shifted = gram + diagonal * (b / (2 * c))
    return c * _product(precision, shifted, shifted) + diagonal * (a - b * b / (4 * c))


def _product(precision: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    if precision == "bfloat16":
        return jnp.matmul(a, b)  # summed in float32, written as it is read: half of the bytes
    return jnp.matmul(a, b, precision=precision)
