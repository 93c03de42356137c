"""The matrices of leaves made nearly orthogonal: in batches, each by one device."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lopt_jax.context import Tracing
from lopt_jax.dealing import dealt, devices_of
from lopt_jax.optimizers.plans import Matrix
from lopt_jax.partition import Dims, Partition, spread
from lopt_jax.rows import concatenate
from lopt_jax.rules.newton_schulz import Coefficients, newton_schulz, precision_on
from lopt_jax.tensors import Tensors

_BATCH_ELEMENTS = 1 << 25  # of matrices that one device iterates together: bounds the temporaries


class NewtonSchulz(NamedTuple):
    """How matrices are made nearly orthogonal: arguments of `newton_schulz`."""

    coefficients: Coefficients
    precision: str


def orthogonal_leaves(
    leaves: Sequence[jax.Array],
    matrices: Sequence[Matrix],
    tensors: Sequence[Tensors],
    names: Sequence[str],
    how: NewtonSchulz,
    tracing: Tracing,
) -> list[jax.Array]:
    """Leaves with their matrices made nearly orthogonal.

    The iterations take whole matrices: what one device holds of a split matrix has other singular
    vectors. So matrices are dealt out over the devices.

    Args:
      leaves: of any shapes, float32 or wider; or shards of them.
      matrices: where the matrices of each leaf are.
      tensors: how each leaf is seen as tensors.
      names: of the leaves, for messages.
      how: coefficients and precision.
      tracing: what steers the trace.

    Returns:
      The leaves, in the same order.
    """
    if not leaves:
        return []
    stacks = [len(entry.stack) for entry in tensors]
    dims = [
        Dims((None,) * stack + tuple(range(len(entry.shape))), i)
        for i, (stack, entry) in enumerate(zip(stacks, tensors, strict=True))
    ]
    return spread(
        functools.partial(_orthogonal_shards, how, tuple(matrices), tuple(stacks)),
        tuple(leaves),
        tuple(dims),
        lambda _: dims,
        [entry.whole_shape for entry in tensors],
        [entry.partition for entry in tensors],
        [[i] for i in range(len(leaves))],
        names,
        tracing,
        settings=(how, tuple(matrices), tuple(stacks)),
    )


def _orthogonal_shards(
    how: NewtonSchulz,
    matrices: Sequence[Matrix],
    stacks: Sequence[int],
    tracing: Tracing,
    partitions: Sequence[Partition | None],
    *leaves: jax.Array,
) -> list[jax.Array]:
    """`orthogonal_leaves`, of what a device holds of the leaves."""
    devices = devices_of(tracing)
    orthogonalize = functools.partial(
        newton_schulz, coefficients=how.coefficients, precision=how.precision, tracing=tracing
    )
    if not devices:
        return _in_batches(orthogonalize, matrices, leaves)
    in_bfloat16 = precision_on(tracing, how.precision) == "bfloat16"
    kinds = [
        _kind(leaf.shape[stack:], leaf.dtype, matrix, stack, partition, devices)
        for leaf, matrix, stack, partition in zip(leaves, matrices, stacks, partitions, strict=True)
    ]
    counts = [math.prod(x.shape[:stack]) for x, stack in zip(leaves, stacks, strict=True)]
    out: list[Any] = list(leaves)
    for kind, members in _alike(kinds, counts):
        flat = [leaves[i].reshape((-1, *kind.shape)) for i in members]
        travels = jnp.bfloat16 if in_bfloat16 and kind.dtype != jnp.float64 else kind.dtype
        of_tensors = functools.partial(_orthogonal_leaf, orthogonalize, kind.matrix)
        made = dealt(of_tensors, concatenate(flat), kind.partition, kind.devices, travels)
        ends = np.cumsum([len(x) for x in flat])[:-1]
        for i, part in zip(members, jnp.split(made, ends), strict=True):
            out[i] = part.reshape(leaves[i].shape)
    return out


class _Kind(NamedTuple):
    """What tensors have in common that are dealt out together."""

    shape: tuple[int, ...]  # of what a device holds of a tensor
    dtype: jnp.dtype
    matrix: Matrix  # axes counted from the end
    partition: Partition  # along the axes of matrices alone
    devices: tuple[str, ...]  # mesh axes among whose devices the tensors are dealt out

    @property
    def limit(self) -> int:
        """How many tensors are iterated together."""
        sharing = math.prod(jax.lax.axis_size(name) for name in self.devices)
        return max(_BATCH_ELEMENTS // max(math.prod(self.partition.shape), 1), 1) * sharing


def _kind(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    matrix: Matrix,
    stack: int,
    partition: Partition | None,
    devices: tuple[str, ...],
) -> _Kind:
    """The kind of a leaf's tensors.

    Matrices that a device holds whole, since only axes beside theirs are split, stay with it.
    """
    rank = len(shape)
    rows, columns = (tuple(a % (stack + rank) - stack - rank for a in axes) for axes in matrix)
    if partition is None:
        return _Kind(shape, dtype, Matrix(rows, columns), Partition(shape, ((),) * rank), devices)
    beside = [dim for dim in range(rank) if dim - rank not in (*rows, *columns)]
    whole = Partition(
        tuple(n if d in beside else partition.shape[d] for d, n in enumerate(shape)),
        tuple(() if d in beside else names for d, names in enumerate(partition.axes)),
    )
    others = tuple(name for name in devices if name not in partition.names(beside))
    return _Kind(shape, dtype, Matrix(rows, columns), whole, others)


def _alike(kinds: Sequence[_Kind], counts: Sequence[int]) -> list[tuple[_Kind, list[int]]]:
    """Positions of leaves of one kind, as many together as may be."""
    groups: dict[_Kind, list[list[int]]] = {}
    for i, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        alike = groups.setdefault(kind, [[]])
        if alike[-1] and sum(counts[j] for j in alike[-1]) + count > kind.limit:
            alike.append([])
        alike[-1].append(i)
    return [(kind, members) for kind, alike in groups.items() for members in alike]


def _in_batches(
    orthogonalize: Callable[[jax.Array], jax.Array],
    matrices: Sequence[Matrix],
    leaves: Sequence[jax.Array],
) -> list[jax.Array]:
    """Whole leaves on one device: all matrices of one shape are one batch."""
    out: list[Any] = list(leaves)
    batches: dict[Any, list[list[int]]] = {}
    for i, (leaf, matrix) in enumerate(zip(leaves, matrices, strict=True)):
        shape = jax.eval_shape(functools.partial(as_matrices, matrix=matrix), leaf).shape
        alike = batches.setdefault((shape[-2:], leaf.dtype), [[]])
        if alike[-1] and sum(leaves[j].size for j in alike[-1]) + leaf.size > _BATCH_ELEMENTS:
            alike.append([])
        alike[-1].append(i)
    for members in (members for alike in batches.values() for members in alike):
        if len(members) == 1:
            (i,) = members
            out[i] = _orthogonal_leaf(orthogonalize, matrices[i], leaves[i])
            continue
        parts = [as_matrices(leaves[i], matrices[i]) for i in members]
        flat = [x.reshape((-1, *x.shape[-2:])) for x in parts]
        made = orthogonalize(concatenate(flat))
        ends = np.cumsum([len(x) for x in flat])[:-1]
        for i, x, part in zip(members, parts, jnp.split(made, ends), strict=True):
            out[i] = from_matrices(part.reshape(x.shape), matrices[i], leaves[i].shape)
    return out


def _orthogonal_leaf(
    orthogonalize: Callable[[jax.Array], jax.Array], matrix: Matrix, leaf: jax.Array
) -> jax.Array:
    return from_matrices(orthogonalize(as_matrices(leaf, matrix)), matrix, leaf.shape)


def _order(matrix: Matrix, rank: int) -> tuple[int, ...]:
    """The axes of a leaf: batch axes, then those of rows, then those of columns."""
    rows, columns = (tuple(a % rank for a in axes) for axes in matrix)
    batch = tuple(a for a in range(rank) if a not in (*rows, *columns))
    return (*batch, *rows, *columns)


def as_matrices(x: jax.Array, matrix: Matrix) -> jax.Array:
    """The matrices of a leaf in the last two axes: (*batch axes, rows, columns)."""
    x = jnp.transpose(x, _order(matrix, x.ndim))
    first, second = x.ndim - len(matrix.rows) - len(matrix.columns), x.ndim - len(matrix.columns)
    batch, rows, columns = x.shape[:first], x.shape[first:second], x.shape[second:]
    return x.reshape((*batch, math.prod(rows), math.prod(columns)))


def from_matrices(x: jax.Array, matrix: Matrix, shape: Sequence[int]) -> jax.Array:
    """The inverse of `as_matrices`, for a leaf of this shape."""
    order = _order(matrix, len(shape))
    back = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(x.reshape([shape[a] for a in order]), back)
