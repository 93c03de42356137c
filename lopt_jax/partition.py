"""How a function of whole tensors runs on shards of them.

A function of a tensor is written once, for the part of the tensor that a device holds, and is told
by a `Partition` how the whole is spread. What it needs to know of the other parts are sums; those
it takes through `lopt_jax.reductions`, which adds the sums over devices. `spread` runs such a
function in each of JAX's ways of sharding:

  - under `jit` with automatic sharding the compiler knows the shardings and Python does not: the
    function becomes one operation of the compiler's partitioner (`custom_partitioning`), which asks
    for the code of a shard once the shardings are known;
  - with explicit sharding the types say the sharding: the function runs in a `shard_map`;
  - inside `shard_map` and `pmap` the arrays are shards already: `lopt_jax.sharding.distributed`
    says of what, and the function runs as it is.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lopt_jax.context import Shards, Tracing, settings_now

logger = logging.getLogger("lopt_jax")

REPLICATED_ELEMENTS = 1 << 12  # arrays up to this size are best held whole by every device


@dataclass(frozen=True)
class Partition:
    """How a tensor is spread over a mesh.

    Attributes:
      shape: of the whole tensor.
      axes: for every dimension, the mesh axes that split it, major first. Where their product does
        not divide the dimension, every device holds an equal part and the last ones are padded.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]

    def names(self, dims: Sequence[int]) -> tuple[str, ...]:
        """The mesh axes that split any of these dimensions."""
        return tuple(name for dim in dims for name in self.axes[dim])

    def reduced(self, dim: int) -> "Partition":
        """The partition of the tensor's reduction over a dimension, kept with size 1."""
        replace = lambda x, value: (*x[:dim], value, *x[dim + 1 :])  # noqa: E731
        return Partition(replace(self.shape, 1), replace(self.axes, ()))

    def without(self, dim: int) -> "Partition":
        """The partition of the tensor's reduction over a dimension."""
        return Partition(
            self.shape[:dim] + self.shape[dim + 1 :], self.axes[:dim] + self.axes[dim + 1 :]
        )

    def stacked(self, tensors: int) -> "Partition":
        """The partition of so many tensors, along a leading axis that is not split."""
        return Partition((tensors, *self.shape), ((), *self.axes))

    def clear_padding(self, x: jax.Array, dims: Sequence[int]) -> jax.Array:
        """A shard with zeros where it is padding, along these dimensions."""
        for dim in dims:
            if not self.axes[dim]:
                continue
            size, device = x.shape[dim], jax.lax.axis_index(self.axes[dim])
            if size * jax.lax.axis_size(self.axes[dim]) == self.shape[dim]:
                continue
            # counted in the shard: a position in the whole may be more than an int32 holds
            full, rest = divmod(self.shape[dim], size)
            length = jnp.where(device < full, size, jnp.where(device == full, rest, 0))
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, dim) < length, x, 0)
        return x

    def is_split(self) -> bool:
        """Whether any dimension is."""
        return any(self.axes)

    def is_padded(self, shard_shape: Sequence[int]) -> bool:
        """Whether the last devices' shards hold padding, inside `shard_map`."""
        return any(
            size * jax.lax.axis_size(names) != whole
            for size, names, whole in zip(shard_shape, self.axes, self.shape, strict=True)
            if names
        )

    def total(self, x: jax.Array, dims: Sequence[int]) -> jax.Array:
        """The sum over devices of what each has summed over its part of these dimensions."""
        names = self.names(dims)
        return jax.lax.psum(x, names) if names else x

    def shard(self, whole: jax.Array) -> jax.Array:
        """The part of the whole tensor that this device holds."""
        for dim, names in enumerate(self.axes):
            if names:
                parts = _parts(self._padded(whole, dim), dim, jax.lax.axis_size(names))
                device = jax.lax.axis_index(names)
                whole = jax.lax.dynamic_index_in_dim(parts, device, dim, keepdims=False)
        return whole

    def gather(self, shard: jax.Array) -> jax.Array:
        """The whole tensor, on every device, from the devices' parts."""
        for dim, names in enumerate(self.axes):
            if names:
                shard = jax.lax.all_gather(shard, names, axis=dim, tiled=True, to="invarying")
                shard = jax.lax.slice_in_dim(shard, 0, self.shape[dim], axis=dim)
        return shard

    def own_part(self, shard: jax.Array, names: Sequence[str]) -> jax.Array:
        """The whole tensor, with zeros where other devices hold it: what is to be summed over them.

        Args:
          shard: of the tensor.
          names: the mesh axes to sum over: all that split it, and perhaps others.

        Returns:
          The tensor.
        """
        own = self.names(range(len(self.axes)))
        others = tuple(name for name in names if name not in own)
        if others:
            shard = jnp.where(jax.lax.axis_index(others) == 0, shard, 0)
        if not own:
            return shard
        for dim, of_dim in enumerate(self.axes):
            if of_dim:
                devices, device = jax.lax.axis_size(of_dim), jax.lax.axis_index(of_dim)
                before, size, after = shard.shape[:dim], shard.shape[dim], shard.shape[dim + 1 :]
                parts = jnp.zeros((*before, devices, size, *after), shard.dtype)
                parts = jax.lax.dynamic_update_index_in_dim(parts, shard, device, dim)
                shard = parts.reshape((*before, devices * size, *after))
        return shard[tuple(map(slice, self.shape))]

    def scatter_mean(self, whole: jax.Array, names: tuple[str, ...]) -> jax.Array:
        """This device's part of the mean over devices of tensors that each holds whole.

        Args:
          whole: the tensor, another one on every device.
          names: the mesh axes of the devices: those that split a dimension, if one is split.

        Returns:
          The part.
        """
        for dim, split in enumerate(self.axes):
            if split:
                total = jax.lax.psum_scatter(
                    self._padded(whole, dim), names, scatter_dimension=dim, tiled=True
                )
                return total / jax.lax.axis_size(names)
        return jax.lax.pmean(whole, names)

    def _padded(self, whole: jax.Array, dim: int) -> jax.Array:
        """The whole tensor, so long along a dimension that every device gets an equal part."""
        missing = -self.shape[dim] % jax.lax.axis_size(self.axes[dim])
        return pad_to(whole, dim, self.shape[dim] + missing)


def pad_to(x: jax.Array, dim: int, size: int) -> jax.Array:
    """The array with zeros at the end of a dimension, up to a size."""
    missing = size - x.shape[dim]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if d == dim else 0) for d in range(x.ndim)])


def _parts(whole: jax.Array, dim: int, devices: int) -> jax.Array:
    """The tensor with a dimension as two: devices and what each holds.

    A part's number fits into an int32, which its place in a dimension of more elements does not.
    """
    before, size, after = whole.shape[:dim], whole.shape[dim], whole.shape[dim + 1 :]
    return whole.reshape((*before, devices, size // devices, *after))


def split_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


@dataclass(frozen=True)
class Dims:
    """What each dimension of an operand or result is.

    Attributes:
      labels: a position among the part's dimensions, or None for a dimension that is never split.
      part: which of several parts the array belongs to: each is split in a way of its own.
    """

    labels: tuple[int | None, ...]
    part: int = 0


def whole_dims(tree: Any) -> Any:
    """Dims of arrays that are whole on every device."""
    return jax.tree.map(lambda x: Dims((None,) * np.ndim(x)), tree)


def partitions_of(paths: Sequence[str], shards: Shards | None) -> list[Partition | None]:
    """The partitions of leaves by their paths; None for whole leaves.

    Args:
      paths: of the leaves.
      shards: as in `Tracing`.

    Raises:
      ValueError: there are shards, and none is of a leaf's.
    """
    if shards is None:
        return [None] * len(paths)
    known = dict(shards)
    missing = [path for path in paths if path not in known]
    if missing:
        raise ValueError(
            f"distributed: the optimizer was given a parameter {missing[0]} that is not one of the "
            "tree that distributed was given. Transformations inside distributed must keep the "
            "structure of the params (optax.masked and optax.multi_transform do)."
        )
    return [known[path] for path in paths]


Partitions = Sequence[Partition | None]  # of each part

_said: set[str] = set()


def say_once(message: str) -> None:
    """Logs a warning, the first time only."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def spread(
    function: Callable[..., Any],
    operands: tuple,
    operand_dims: Any,
    result_dims: Callable[[Any], Any],
    shapes: Sequence[Sequence[int]],
    partitions: Partitions,
    guides: Sequence[Sequence[int]],
    names: Sequence[str],
    tracing: Tracing,
    settings: Any = None,
) -> Any:
    """Runs a function of tensors on the shards of them.

    Args:
      function: takes what steers its trace, the partition of each part (None: its arrays are whole)
        and the operands.
      operands: pytrees of arrays.
      operand_dims: the same pytrees with `Dims` for arrays.
      result_dims: from the result (of shapes) to a pytree like it of `Dims`.
      shapes: for each part that of the whole tensors.
      partitions: where the operands are shards already: how the tensors of each part are spread.
      guides: for each part the positions among the flattened operands of the arrays whose sharding
        decides; of these the most split one does.
      names: of the parts, for messages.
      tracing: what steers the trace.
      settings: what else of the function is static: its representation differs where the code of a
        shard may, also between processes.

    Returns:
      The function's result.
    """
    if None not in partitions:
        return function(tracing, partitions, *operands)
    given, treedef = jax.tree.flatten(operands)
    dims = jax.tree.leaves(operand_dims, is_leaf=_is_dims)
    known, leaves = _known_apart(given, dims)
    dims = [x for i, x in enumerate(dims) if i not in known]
    guides = [[i - sum(k < i for k in known) for i in part] for part in guides]
    explicit = [[_explicit_axes(leaves[i], dims[i]) for i in part] for part in guides]
    typed = [[axes for axes in part if axes is not None] for part in explicit]
    is_typed = any(any(axes.values()) for part in typed for axes in part)
    if not is_typed and (any(typed) or tracing.is_local):
        return function(tracing, [None] * len(guides), *operands)

    as_now = settings_now()
    of_shard = dataclasses.replace(tracing.with_device(), is_shard=True)
    # devices have other names in other processes
    static = tracing.platform, dataclasses.replace(tracing, device=None), settings

    def run_local(partitions: Partitions, *xs: jax.Array, axes: tuple[str, ...] = ()) -> Any:
        with as_now():
            steered = dataclasses.replace(of_shard, axes=axes)
            return function(steered, partitions, *treedef.unflatten(_merged(known, xs)))

    def local(
        partitions: Partitions, *xs: jax.Array, axes: tuple[str, ...] = ()
    ) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(run_local(partitions, *xs, axes=axes)))

    whole = functools.partial(run_local, [None] * len(guides))
    # traced once: for the shapes of the results, for the fingerprint, and to run what is not split
    program, result = jax.make_jaxpr(whole, return_shape=True)(*map(_bare, leaves))
    out_treedef = jax.tree.structure(result)
    out_dims = jax.tree.leaves(result_dims(result), is_leaf=_is_dims)
    call = _Call(local, program, dims, out_dims, shapes, names, static)
    return out_treedef.unflatten(
        _in_shard_map(call, leaves, typed) if is_typed else _partitioned(call, leaves, guides)
    )


class _Call(NamedTuple):
    """A flat function of tensors; no operand, as XLA keeps it to ask for the code of a shard."""

    local: Callable[..., tuple[jax.Array, ...]]  # of the partition of each part and of shards
    program: jax.extend.core.ClosedJaxpr  # what it computes of whole tensors
    dims: Sequence[Dims]  # of the operands
    out_dims: Sequence[Dims]  # of the results
    shapes: Sequence[Sequence[int]]  # of whole tensors, for each part
    names: Sequence[str]  # of the parts
    settings: Any  # see `_fingerprint`


def is_explicit(x: jax.Array) -> bool:
    """Whether the type of an array says how it is sharded."""
    return _explicit_sharding(x) is not None


def may_be_split(tracing: Tracing, arrays: Sequence[jax.Array]) -> bool:
    """Whether a partitioner may split arrays, or types say how they are split."""
    return not tracing.is_local or any(map(is_explicit, arrays))


def _known_apart(
    leaves: Sequence[Any], dims: Sequence[Dims]
) -> tuple[dict[int, Any], list[jax.Array]]:
    """Numbers that Python knows and no device has a part of, by their positions, and the others.

    What is known stays a constant of the program.
    """
    known = {
        i: x
        for i, (x, d) in enumerate(zip(leaves, dims, strict=True))
        if not isinstance(x, jax.Array) and set(d.labels) <= {None}
    }
    return known, [jnp.asarray(x) for i, x in enumerate(leaves) if i not in known]


def _merged(known: Mapping[int, Any], arrays: Sequence[jax.Array]) -> list[Any]:
    """The leaves that `_known_apart` took apart."""
    rest = iter(arrays)
    return [known[i] if i in known else next(rest) for i in range(len(known) + len(arrays))]


def mesh_of(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which there is a mesh: where none is set, the one that traced arrays name.

    Types say shardings wherever arrays lie on a mesh of `jax.make_mesh`, set or not.
    """
    if jax.sharding.get_abstract_mesh().empty:
        traced = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.core.Tracer)]
        for sharding in filter(None, map(_explicit_sharding, traced)):
            return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def checked_axes() -> frozenset[str]:
    """Mesh axes along which types say what varies: those of a `shard_map` that checks."""
    names = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return varying_axes(jax.lax.axis_index(names)) if names else frozenset()


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes along which the type of an array lets it vary; none where nothing is checked."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _is_dims(x: Any) -> bool:
    return isinstance(x, Dims)


def _bare(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


Axes = dict[int, tuple[str, ...]]  # mesh axes by label


def _spec(dims: Dims, by_part: Sequence[Axes]) -> PartitionSpec:
    axes = by_part[dims.part]
    entries = [axes.get(label, ()) if label is not None else () for label in dims.labels]
    return PartitionSpec(*(names if len(names) > 1 else (names or (None,))[0] for names in entries))


def _axes(spec: PartitionSpec, dims: Dims) -> Axes:
    return {
        label: split_names(entry)
        for label, entry in zip(dims.labels, (*spec, *[None] * len(dims.labels)), strict=False)
        if label is not None
    }


def _partitions(shapes: Sequence[Sequence[int]], by_part: Sequence[Axes]) -> Partitions:
    """How the tensors of each part are spread; None where they are not."""
    return [
        Partition(tuple(shape), tuple(axes.get(dim, ()) for dim in range(len(shape))))
        if any(axes.values())
        else None
        for shape, axes in zip(shapes, by_part, strict=True)
    ]


def _most_split(candidates: Sequence[Axes], sizes: Mapping[str, int]) -> Axes:
    pieces = lambda axes: math.prod(sizes[n] for names in axes.values() for n in names)  # noqa: E731
    return max(candidates, key=pieces)


# Explicit sharding


def _explicit_axes(x: jax.Array, dims: Dims) -> Axes | None:
    """How the type says that an array is split; None where it says nothing."""
    sharding = _explicit_sharding(x)
    return None if sharding is None else _axes(sharding.spec, dims)


def _in_shard_map(
    call: _Call, operands: Sequence[jax.Array], candidates: Sequence[Sequence[Axes]]
) -> Sequence[jax.Array]:
    """Runs a function where types say how arrays are split.

    Of the candidates of each part the most split one decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = [_most_split(part or [{}], dict(mesh.shape)) for part in candidates]
    partitions = _partitions(call.shapes, axes)
    explicit = {
        n
        for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    specs = tuple(_spec(d, axes) for d in call.dims)
    return jax.shard_map(
        lambda *xs: call.local(partitions, *xs),
        in_specs=specs,
        out_specs=tuple(_spec(d, axes) for d in call.out_dims),
        axis_names=explicit,
        check_vma=False,
    )(*(jax.sharding.reshard(x, spec) for x, spec in zip(operands, specs, strict=True)))


# Automatic sharding


def _partitioned(
    call: _Call, operands: Sequence[jax.Array], guides: Sequence[Sequence[int]]
) -> Sequence[jax.Array]:
    """Runs a function as an operation of the partitioner; `guides` as `spread` has them."""
    program, whole = call.program, functools.partial(call.local, [None] * len(guides))
    # custom_partitioning takes no constants: they become operands that every device has.
    # In XLA's cache of compiled programs the operation has no content. Its fingerprint is among its
    # operands: so programs that differ in the code of a shard alone are different ones.
    added = [*_fingerprint(program, call.settings), *program.consts]
    in_dims, first = [*whole_dims(added), *call.dims], len(added)

    def with_constants(*xs: jax.Array) -> tuple[jax.Array, ...]:
        constants = list(xs[first - len(program.consts) : first])
        closed = jax.extend.core.ClosedJaxpr(program.jaxpr, constants)
        return tuple(jax.extend.core.jaxpr_as_fun(closed)(*xs[first:]))

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        shardings = [x.sharding for x in arguments[first:]]
        axes = [
            _split_by([shardings[i] for i in part], call.dims[part[0]], dict(mesh.shape), name)
            for part, name in zip(guides, call.names, strict=True)
        ]
        partitions = _partitions(call.shapes, axes)
        named = lambda d: NamedSharding(mesh, _spec(d, axes))  # noqa: E731
        return (
            mesh,
            lambda *xs: call.local(partitions, *xs[first:], axes=tuple(mesh.axis_names)),
            tuple(named(d) for d in call.out_dims),
            tuple(named(d) for d in in_dims),
        )

    def sharding_rule(*_: Any) -> str:  # asked for where the program is one of several devices
        if _is_exported():
            raise NotImplementedError(
                "jax.export: the update of arrays that automatic sharding may split is not "
                "exportable, since XLA asks Python for the code of a shard while it compiles. Call "
                "it inside jax.sharding.explicit_axes, or lay the arrays on a mesh of explicit "
                "axes, jax.make_mesh's default (docs/sharding.md)."
            )
        return _sharding_rule(in_dims, call.out_dims)

    operation = custom_partitioning(with_constants)
    operation.def_partition(partition=partition, sharding_rule=sharding_rule)

    # custom_partitioning knows neither batching nor differentiation: there the function is plain.
    @custom_vmap
    def batchable(*xs: jax.Array) -> tuple[jax.Array, ...]:
        return operation(*added, *xs)

    @batchable.def_vmap
    def _(axis_size: int, in_batched: Any, *xs: jax.Array) -> Any:
        out = jax.vmap(whole, in_axes=[0 if b else None for b in in_batched], axis_size=axis_size)(
            *xs
        )
        return out, tuple(True for _ in out)

    @jax.custom_jvp
    def differentiable(*xs: jax.Array) -> tuple[jax.Array, ...]:
        return batchable(*xs)

    differentiable.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
    return differentiable(*operands)


def _is_exported() -> bool:
    """Whether `jax.export` lowers the program: nothing but the stack tells.

    Its own error, a step later, speaks of host callbacks.
    """
    frames = (frame for frame, _ in traceback.walk_stack(None))
    return any(frame.f_globals.get("__name__") == jax.export.export.__module__ for frame in frames)


def _fingerprint(program: jax.extend.core.ClosedJaxpr, settings: Any) -> list[np.uint32]:
    """Numbers that differ where programs do, and are the same in every process.

    Args:
      program: what the operation computes of whole tensors.
      settings: see `spread`.
    """
    from lopt_jax import __version__

    text = f"{__version__} {settings!r} {program.jaxpr}"
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode())
    for x in _constants_inside(program.jaxpr):
        if not isinstance(x, jax.core.Tracer):
            digest.update(np.asarray(x).tobytes())
    # scalars: they are part of the program's text, arrays may become its arguments
    return list(np.frombuffer(digest.digest()[:16], np.uint32))


def _constants_inside(jaxpr: Any) -> Iterator[Any]:
    """The constants of the programs inside a program, whose values its text does not tell."""
    for equation in jaxpr.eqns:
        is_program = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_program):
            if is_program(part):
                yield from getattr(part, "consts", ())
                yield from _constants_inside(getattr(part, "jaxpr", part))


def _split_by(guides: Sequence[Any], dims: Dims, sizes: Mapping[str, int], name: str) -> Axes:
    """The mesh axes by which a part is split, from the shardings of its guides."""
    specs: list[Any] = [getattr(sharding, "spec", None) for sharding in guides]
    if None in specs:
        say_once(
            f"{name}: its sharding is no NamedSharding, which lopt_jax cannot split by; every "
            "device gathers and updates the whole tensor."
        )
        return {}
    split_by = [_axes(spec, dims) for spec in specs]
    axes = _most_split(split_by, sizes)
    if any(other != axes for other in split_by):
        say_once(
            f"{name}: parameter and optimizer state are sharded differently "
            f"({', '.join(map(str, specs))}); one of them is moved at every step. "
            "lopt_jax.sharding.state_shardings gives the state the "
            "parameters' sharding."
        )
    return axes


def _sharding_rule(dims: Sequence[Dims], out_dims: Sequence[Dims]) -> str:
    """Shardy's notation: a name a dimension; those that are never split have names of their own."""
    unique = iter(range(1 << 30))

    def names(d: Dims) -> str:
        return " ".join(
            f"u{next(unique)}" if label is None else f"p{d.part}_{label}" for label in d.labels
        )

    return ", ".join(map(names, dims)) + " -> " + ", ".join(map(names, out_dims))


# Arrays of the state


class Layout(NamedTuple):
    """An array of the state that belongs to a parameter."""

    dims: tuple[int | None, ...]  # the parameter's dimension that each is; None: none of them
    size: int  # of the dimensions that are none of the parameter's
    dtype: Any


def zeros(like: Any, layouts: Sequence[Layout]) -> list[jax.Array]:
    """Zeros that lie where the array lies that they belong to, as far as Python knows it.

    Args:
      like: the array.
      layouts: of the zeros.

    Returns:
      The zeros: split as the array, in its kind of memory; where no device was chosen for the
      array, none is for them.
    """
    shapes = [tuple(x.size if d is None else like.shape[d] for d in x.dims) for x in layouts]
    pairs = list(zip(shapes, layouts, strict=True))
    if isinstance(like, jax.Array) and not isinstance(like, jax.core.Tracer):
        if not like.committed:
            return [jnp.zeros(shape, x.dtype) for shape, x in pairs]
        places = [_sharding_of_dims(like.sharding, x.dims) for x in layouts]
        return [
            jnp.zeros(shape, x.dtype, device=place)
            for (shape, x), place in zip(pairs, places, strict=True)
        ]
    sharding = _explicit_sharding(like)
    made = [jnp.zeros(shape, x.dtype) for shape, x in pairs]
    if sharding is None:
        return made
    specs = [spec_of_dims(sharding.spec, x.dims) for x in layouts]
    split = [jax.sharding.reshard(x, spec) for x, spec in zip(made, specs, strict=True)]
    # a program that reads no parameter would not know the devices
    return jax.lax.optimization_barrier((split, like))[0]


def _sharding_of_dims(sharding: Any, dims: Sequence[int | None]) -> Any:
    """Where an array lies whose dimensions are some of those of an array that lies there.

    None, which is the default device, where that cannot be said.
    """
    if isinstance(sharding, NamedSharding):
        spec = spec_of_dims(sharding.spec, dims)
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return sharding if len(sharding.device_set) == 1 else None


def spec_of_dims(spec: PartitionSpec, dims: Sequence[int | None]) -> PartitionSpec:
    """The spec of an array whose dimensions are some of those of an array with this spec."""
    entries = (*spec, *[None] * len(dims), *[None] * len(spec))
    return PartitionSpec(*(None if d is None else entries[d] for d in dims))


def match_sharding(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array with the sharding of another, where types say shardings."""
    sharding = _explicit_sharding(like)
    if sharding is None or jax.typeof(x).sharding.spec == sharding.spec:
        return x
    return jax.sharding.reshard(x, sharding.spec)


def _explicit_sharding(x: Any) -> NamedSharding | None:
    sharding = getattr(jax.typeof(x), "sharding", None) if isinstance(x, jax.Array) else None
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return sharding
