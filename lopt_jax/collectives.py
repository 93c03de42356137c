"""What a compiled program moves between devices, read off its HLO."""

import math
import re
from typing import NamedTuple

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_ITEM_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_INSTRUCTION = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<rest>.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


class Collective(NamedTuple):
    """One collective operation of a compiled program.

    `bytes` is the size of the array it is about: the result of a gather, the operand of a
    reduce-scatter or all-reduce, a device's part of an all-to-all or permutation.
    """

    kind: str  # "all-gather", "all-reduce", "reduce-scatter", ...
    bytes: int  # a step, all operands together
    largest: int  # elements of its largest array
    arrays: int  # operands
    times: int  # a step: more than one inside loops


def collectives(compiled: object) -> list[Collective]:
    """The collectives of a compiled function.

    Args:
      compiled: of `jax.jit(f).lower(...).compile()`, or its text.

    Returns:
      One entry an operation; sum `bytes * times` for the traffic of one call. Loops whose number
      of iterations XLA does not know count once.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()  # type: ignore[attr-defined]
    times = _loop_times(text)
    out, current = [], ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header.group(1)
        found = _INSTRUCTION.search(line)
        if found is None:
            continue
        kind, arrays = found["kind"], _arrays(found["type"])
        if found["start"] and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :]  # the type lists operands, then results
        if kind == "reduce-scatter":
            size = _group_size(line)
            arrays = [(n * size, item) for n, item in arrays]
        out.append(
            Collective(
                kind=kind,
                bytes=sum(n * item for n, item in arrays),
                largest=max((n for n, _ in arrays), default=0),
                arrays=len(arrays),
                times=times.get(current, 1),
            )
        )
    return out


def moved_bytes(found: list[Collective], kind: str | None = None) -> int:
    """Bytes of all collectives, or of one kind, in one call of the program."""
    return sum(c.bytes * c.times for c in found if kind in (None, c.kind))


def _arrays(type_text: str) -> list[tuple[int, int]]:
    """(elements, bytes an element) of every array in an HLO type."""
    out = []
    for dtype, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", type_text)):
        if dtype in _ITEM_BYTES:
            elements = 1
            for n in dims.split(","):
                elements *= int(n) if n else 1
            out.append((elements, _ITEM_BYTES[dtype]))
    return out


def _group_size(line: str) -> int:
    mesh = _MESH_GROUPS.search(line)
    if mesh is not None:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']*)'", mesh[2]))
    found = _GROUPS.search(line)
    if found is None:
        return 1
    return len(found[1].split(",")) if found[1] is not None else int(found[2])


def _loop_times(text: str) -> dict[str, int]:
    """How often each computation that is a loop's body runs."""
    times, parents, current = {}, {}, ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header.group(1)
        body = _WHILE.search(line)
        if body:
            trips = _TRIPS.search(line)
            times[body.group(1)] = int(trips.group(1)) if trips else 1
            parents[body.group(1)] = current

    def total(name: str) -> int:
        return times.get(name, 1) * (total(parents[name]) if name in parents else 1)

    return {name: total(name) for name in times}
