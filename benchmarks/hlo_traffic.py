"""What a compiled program moves and computes, read from its text.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and takes copies
between a TPU's memory and its on-chip memory for traffic of both. Here a body counts as often as
it runs, and the two memories are counted apart.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2}
_BYTES |= {"f16": 2, "s16": 2, "u16": 2, "pred": 1, "s8": 1, "u8": 1}

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
# Instructions that move nothing: they name what lies in memory, or wait for what was started.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"copy-done", "slice-done", "async-done", "async-update", "opt-barrier", "partition-id"}
_FREE_CALLS = ('custom_call_target="AllocateBuffer"', 'custom_call_target="ConcatBitcast"')
_NO_ARITHMETIC = _FREE | {"broadcast", "reshape", "transpose", "copy", "slice", "pad", "convert"}
_NO_ARITHMETIC |= {"concatenate", "dynamic-slice", "dynamic-update-slice", "fusion", "copy-start"}
_NO_ARITHMETIC |= {"slice-start", "custom-call", "while", "conditional", "call", "bitcast-convert"}


class Array(NamedTuple):
    """An array of a program."""

    bytes: int
    elements: int
    on_chip: bool  # in a memory that is not the device's main one


class Instruction(NamedTuple):
    """An instruction of a program."""

    name: str
    result: list[Array]
    opcode: str
    operands: list[str]
    rest: str  # its operands and attributes, as text
    is_root: bool


class Traffic(NamedTuple):
    """What a program moves and computes in one run."""

    main_bytes: float  # read from and written to the device's main memory
    on_chip_bytes: float  # read from and written to on-chip memory, where XLA places arrays in it
    flops: float
    fusions: int  # in the program's text
    launches: int  # instructions that do something, as often as they run


class Program:
    """A compiled program.

    Args:
      text: of `Compiled.as_text`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                current = self.computations[head[2]] = []
                if head[1]:
                    self.entry = head[2]
            elif found := _INSTRUCTION.match(line):
                root, name, result, opcode, rest = found.groups()
                inside = rest[: _closing(rest)]
                operands = re.findall(r"%([\w.\-]+)", inside)
                current.append(
                    Instruction(name, _arrays(result), opcode, operands, rest, bool(root))
                )
        self.results = {
            name: {x.name: x for x in instructions}
            for name, instructions in self.computations.items()
        }

    def traffic(self) -> Traffic:
        """What one run moves and computes."""
        moved = {False: 0.0, True: 0.0}
        flops = launches = 0.0
        for computation, instruction, times in self._running(self.entry, 1):
            launches += times
            flops += times * self._flops(instruction)
            for array, number in self._moved(computation, instruction):
                moved[array.on_chip] += times * number
        fusions = sum(
            x.opcode == "fusion" for name in self._outer() for x in self.computations[name]
        )
        return Traffic(moved[False], moved[True], flops, fusions, int(launches))

    def largest(self, number: int) -> list[tuple[float, str, str]]:
        """The instructions that move most: bytes of both memories, name, and where it is from."""
        sizes = collections.Counter[tuple[str, str]]()
        for computation, instruction, times in self._running(self.entry, 1):
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            moved = sum(n for _, n in self._moved(computation, instruction))
            sizes[instruction.name, source[1] if source else ""] += int(times * moved)
        return [(size, *names) for names, size in sizes.most_common(number)]

    def _outer(self) -> set[str]:
        """The computations whose instructions run one by one."""
        return {name for name, _, _ in self._running(self.entry, 1)}

    def _running(self, name: str, times: float) -> Iterator[tuple[str, Instruction, float]]:
        """All instructions that do something, and how often they run."""
        for x in self.computations[name]:
            if x.opcode == "while":
                yield from self._running(_CALLED.search(x.rest)[1], times * self._trips(x))
            elif x.opcode == "conditional":
                branches = re.findall(r"%?([\w.\-]+)", _attribute(x.rest, "branch_computations"))
                branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", x.rest)
                yield from self._running(branches[0], times)
            elif x.opcode in ("call", "async-start"):
                yield from self._running(_CALLED.search(x.rest)[1], times)
            elif x.opcode not in _FREE and not any(call in x.rest for call in _FREE_CALLS):
                yield name, x, times

    def _trips(self, loop: Instruction) -> int:
        """How often the body of a loop runs: it counts from zero to a constant."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        text = [x for x in self.computations[condition[1]] if x.opcode == "constant"]
        limits = [int(n) for x in text for n in re.findall(r"^(\d+)\)", x.rest)]
        if len(limits) != 1:
            raise ValueError(f"{loop.name}: its condition has {len(limits)} constants, not one")
        return limits[0]

    def _moved(self, computation: str, x: Instruction) -> Iterator[tuple[Array, float]]:
        """The arrays that an instruction reads and writes, and how many bytes of each."""
        known = self.results[computation]
        read = [known[name].result for name in x.operands if name in known]
        if x.opcode in ("copy-start", "slice-start"):
            target = x.result[1] if x.opcode == "slice-start" else x.result[0]
            yield read[0][0], target.bytes
            yield target, target.bytes
        elif x.opcode == "dynamic-slice":
            yield read[0][0], x.result[0].bytes
            yield x.result[0], x.result[0].bytes
        elif x.opcode == "dynamic-update-slice":
            yield read[1][0], read[1][0].bytes
            yield x.result[0], read[1][0].bytes
        elif x.opcode == "fusion":
            inner = _CALLED.search(x.rest)[1]
            for position, arrays in enumerate(read):
                yield arrays[0], min(arrays[0].bytes, self._read_of(inner, position))
            for array, number in zip(x.result, self._written(inner), strict=True):
                yield array, min(array.bytes, number)
        else:
            for arrays in (*read, x.result):
                yield from ((array, array.bytes) for array in arrays)

    def _read_of(self, computation: str, position: int) -> float:
        """How many bytes a fused computation reads of a parameter: of slices, theirs."""
        instructions = self.computations[computation]
        names = {
            x.name
            for x in instructions
            if x.opcode == "parameter" and x.rest.startswith(f"{position})")
        }
        total = 0.0
        for x in instructions:
            if x.opcode in ("bitcast", "reshape") and names & set(x.operands):
                names.add(x.name)
                continue
            for place, operand in enumerate(x.operands):
                if operand not in names:
                    continue
                if x.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    total += x.result[0].bytes
                elif x.opcode == "dynamic-update-slice" and place == 0:
                    continue  # it is written over in place
                elif x.opcode == "fusion":
                    total += self._read_of(_CALLED.search(x.rest)[1], place)
                elif x.opcode != "tuple":
                    total = math.inf
        return total

    def _written(self, computation: str) -> list[float]:
        """How many bytes of each result a fused computation writes: of updated slices, theirs."""
        known = self.results[computation]
        root = next(x for x in self.computations[computation] if x.is_root)
        results = [known[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [number for x in results for number in self._written_by(known, x)]

    def _written_by(self, known: dict[str, Instruction], x: Instruction) -> list[float]:
        while x.opcode in ("bitcast", "reshape"):
            x = known[x.operands[0]]
        if x.opcode == "dynamic-update-slice":
            return [known[x.operands[1]].result[0].bytes]
        if x.opcode == "fusion":
            return self._written(_CALLED.search(x.rest)[1])
        return [array.bytes for array in x.result]

    def _flops(self, x: Instruction, computation: str | None = None) -> float:
        """Arithmetic operations: one an element, and two a factor of products."""
        if x.opcode == "fusion":
            inner = _CALLED.search(x.rest)[1]
            return sum(self._flops(y, inner) for y in self.computations[inner])
        if x.opcode in ("dot", "convolution"):
            known = self.results[computation or self._home(x)]
            a, b = (known[name].result[0].elements for name in x.operands[:2])
            c = x.result[0].elements
            return 2 * c * math.sqrt(a * b / c)
        if x.opcode == "reduce":
            known = self.results[computation or self._home(x)]
            half = len(x.operands) // 2
            return sum(known[name].result[0].elements for name in x.operands[:half])
        return 0 if x.opcode in _NO_ARITHMETIC else sum(array.elements for array in x.result)

    def _home(self, x: Instruction) -> str:
        return next(name for name, known in self.results.items() if known.get(x.name) is x)


def _arrays(text: str) -> list[Array]:
    """The arrays of a type, as it is written."""
    arrays = []
    for dtype, shape, layout in _ARRAY.findall(text):
        if dtype in _BYTES:
            elements = math.prod(int(n) for n in shape.split(",") if n)
            arrays.append(Array(elements * _BYTES[dtype], elements, "S(" in layout))
    return arrays


def _closing(text: str) -> int:
    """Where the parenthesis closes that was open before the text."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    return len(text)


def _attribute(text: str, name: str) -> str:
    found = re.search(name + r"=\{([^}]*)\}", text)
    return found[1] if found else ""
