"""What a compiled program says of itself: its collectives, its traffic to memory and its cycles, read from its text.

XLA's own cost analysis counts the body of a loop once; here everything is counted as often as it runs. Sizes are those
of one device, since the text is the program of one device.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

# How a TPU's program numbers its memories: S(0), which it does not write, is the device's main memory, S(1) each core's
# vector memory (128 MiB in v5e and later, 16 MiB in v4) and S(3) the 128 MiB that the cores of a v4 share. The others
# hold scalars and flags.
MAIN_MEMORY, ON_CHIP = frozenset({0}), frozenset({1, 3})
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

_BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128}
# What moves nothing: names, tuples, views, and calls whose insides are counted instead.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all'}
_FREE |= {'partition-id', 'replica-id', 'opt-barrier', 'copy-done', 'iota', 'async-start', 'async-update'}
# Calls of libtpu that move nothing.
_VIEWS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"')
_SLICES = ('dynamic-slice', 'slice', 'gather')
# How libtpu writes that it has no estimate.
_UNKNOWN_CYCLES = 2**63 - 1
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_CALLED = re.compile(
    r'\b(?:calls|body|to_apply|branch_computations|called_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)'
)


class Array(NamedTuple):
    """One array in a result: its element type, shape, and the memory it lies in (0 is the device's main memory)."""

    dtype: str
    shape: tuple[int, ...]
    memory_space: int

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        digits = re.search(r'\d+', self.dtype)
        bits = _BITS.get(self.dtype) or (int(digits[0]) if digits else 0)
        return math.ceil(math.prod(self.shape) * bits / 8)


class Instruction(NamedTuple):
    """One line of the program: `%name = result opcode(%operand, ...), attributes`."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls, conditions of loops aside."""
        return [
            name.strip().removeprefix('%') for match in _CALLED.findall(self.attributes) for name in match.split(',')
        ]

    @property
    def estimated_cycles(self) -> int | None:
        """Cycles of one run as libtpu's compiler estimates them, 0 for what it counts none for; None: it cannot say."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        if match is None:
            return None if self.is_custom_kernel else 0
        return None if int(match[1]) >= _UNKNOWN_CYCLES else int(match[1])

    @property
    def is_custom_kernel(self) -> bool:
        """Whether it is a kernel of Pallas for TPUs, into which the compiler does not see."""
        return 'custom_call_target="tpu_custom_call"' in self.attributes

    @property
    def source(self) -> str:
        """The part of the model it comes from, as JAX names it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.opcode


class Collective(NamedTuple):
    """One communication: what kind, over how many devices, the arrays of one device, and how often in a step.

    `payload` is the larger side, in bytes: what is summed, gathered (the result), scattered (the input) or sent.
    """

    kind: str
    arrays: tuple[Array, ...]
    payload: int
    group_size: int
    times: int
    source: str

    @property
    def bytes(self) -> int:
        """Payload of all its runs in a step."""
        return self.payload * self.times

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step over a ring: (k - 1) / k of the payload, twice that to sum."""
        share = 1 if self.kind == 'collective-permute' else (self.group_size - 1) / self.group_size
        return self.bytes * share * (2 if self.kind == 'all-reduce' else 1)


class Program:
    """The text of a compiled program, parsed: computations by name, and how often each instruction runs."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ''
        current: dict[str, Instruction] = {}
        for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
            header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
            if header:
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif ' = ' in line and line.startswith(' '):
                instruction = _parse(line)
                current[instruction.name] = instruction

    @cached_property
    def runs(self) -> list[tuple[Instruction, str, int]]:
        """(instruction, its computation, how often it runs), those inside of fused kernels left out."""
        return list(self._walk(self.entry, 1, into=lambda instruction: instruction.opcode != 'fusion'))

    def _walk(
        self, computation: str, times: int, into: Callable[[Instruction], bool]
    ) -> Iterator[tuple[Instruction, str, int]]:
        for instruction in self.computations.get(computation, {}).values():
            yield instruction, computation, times
            # The function that a reduction applies to two elements is no work of its own.
            if instruction.opcode.startswith(('reduce', 'all-reduce', 'scatter', 'sort', 'map', 'select-and')):
                continue
            if into(instruction):
                inner = times * self._trips(instruction) if instruction.opcode == 'while' else times
                for name in instruction.called:
                    yield from self._walk(name, inner, into)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: JAX's scans count from 0 up to a constant in the condition."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = re.search(r'condition=%([\w.\-]+)', loop.attributes)
        inside = self._walk(condition[1], 1, into=lambda _: True) if condition else ()
        bounds = [int(i.attributes) for i, _, _ in inside if i.opcode == 'constant' and i.attributes.isdigit()]
        return max(bounds, default=1)

    def collectives(self) -> list[Collective]:
        """Returns every communication between two or more devices."""
        found = []
        for instruction, where, times in self._walk(self.entry, 1, into=lambda _: True):
            kind = instruction.opcode.removesuffix('-start')
            if kind not in COLLECTIVES:
                continue
            size = _group_size(instruction.attributes)
            if size == 1:
                continue
            inputs = sum(array.bytes for name in instruction.operands for array in self._operand(name, where))
            if instruction.opcode.endswith('-start') and kind != 'all-reduce':
                # The result of a start holds operands and results beside each other.
                payload = max(inputs, sum(array.bytes for array in instruction.result) - inputs)
            else:
                payload = max(inputs, sum(array.bytes for array in instruction.result))
            if 'all-reduce-scatter' in where:
                kind = 'reduce-scatter'
            found.append(Collective(kind, instruction.result, payload, size, times, instruction.source))
        return found

    def traffic(self, memory: frozenset[int] = MAIN_MEMORY) -> int:
        """Returns the bytes that a step reads from and writes to a memory, MAIN_MEMORY or ON_CHIP.

        Every instruction reads its operands and writes its result once; of what it only slices, or updates in place,
        the slice counts.
        """
        return sum(
            times * self.instruction_traffic(instruction, where, memory) for instruction, where, times in self.runs
        )

    def custom_kernel_traffic(self) -> int:
        """Returns the bytes of main memory that Pallas kernels get and return in a step, each array once."""
        runs = ((instruction, where, times) for instruction, where, times in self.runs if instruction.is_custom_kernel)
        return sum(
            times * self.instruction_traffic(instruction, where, MAIN_MEMORY) for instruction, where, times in runs
        )

    def cycles(self) -> int | None:
        """Returns the cycles that libtpu's compiler estimates for a step's kernels; None where it cannot say.

        Those of Pallas are left out: it has no estimate for them.
        """
        counted = [
            (times, instruction.estimated_cycles)
            for instruction, _, times in self.runs
            if not instruction.is_custom_kernel
        ]
        if any(cycles is None for _, cycles in counted):
            return None
        return sum(times * cycles for times, cycles in counted) or None

    def largest_arrays(self, number: int) -> list[tuple[int, str, str]]:
        """Returns (bytes, type and shape, source) of the largest arrays in main memory, arguments aside."""
        sizes = {}
        for instruction, _, _ in self.runs:
            if instruction.opcode in _FREE:
                continue
            for array in instruction.result:
                if array.memory_space in MAIN_MEMORY:
                    shape = f'{array.dtype}[{",".join(map(str, array.shape))}]'
                    sizes[shape, instruction.source] = array.bytes
        return [(size, *key) for key, size in Counter(sizes).most_common(number)]

    def _operand(self, name: str, where: str) -> tuple[Array, ...]:
        known = self.computations[where]
        return known[name].result if name in known else ()

    def instruction_traffic(self, instruction: Instruction, where: str, spaces: frozenset[int]) -> int:
        """Returns the bytes that one run of an instruction of computation `where` reads and writes."""
        opcode, result = instruction.opcode, _bytes(instruction.result, spaces)
        if opcode in _FREE or opcode.endswith('-done') or _VIEWS.search(instruction.attributes):
            return 0
        if opcode in ('copy-start', 'slice-start'):
            # Source and destination stand first in the result, and the smaller of them is what moves.
            ends = instruction.result[:2]
            return min(array.bytes for array in ends) * sum(array.memory_space in spaces for array in ends)
        operands = [_bytes(self._operand(name, where), spaces) for name in instruction.operands]
        if opcode in _SLICES:
            return min(operands[0], sum(array.bytes for array in instruction.result)) + result
        if opcode == 'dynamic-update-slice':
            update = sum(array.bytes for array in self._operand(instruction.operands[1], where))
            return operands[1] + min(result, update)
        if opcode == 'fusion' and instruction.called:
            body = instruction.called[0]
            reads = (_at_most(held, self._read(body, index)) for index, held in enumerate(operands) if held)
            writes = (
                _at_most(array.bytes, written)
                for array, written in zip(instruction.result, self._written(body), strict=True)
                if array.memory_space in spaces
            )
            return sum(reads) + sum(writes)
        return sum(operands) + result

    def _read(self, computation: str, parameter: int) -> int | None:
        """Returns how many bytes of a parameter a fused computation reads, in slices; None: all of them.

        The slices may be taken in fusions inside of the fusion, as in the scan of layers on a TPU.
        """
        body = self.computations[computation]
        name = next(i.name for i in body.values() if i.opcode == 'parameter' and i.attributes == str(parameter))
        names, total = [name], 0
        while names:
            name = names.pop()
            for user in body.values():
                for place in (place for place, operand in enumerate(user.operands) if operand == name):
                    if user.opcode == 'bitcast':
                        names.append(user.name)
                    elif user.opcode in _SLICES and place == 0:
                        total += sum(array.bytes for array in user.result)
                    elif user.opcode == 'fusion' and (inner := self._read(user.called[0], place)) is not None:
                        total += inner
                    elif user.opcode != 'dynamic-update-slice' or place != 0:
                        return None
        return total

    def _written(self, computation: str) -> list[int | None]:
        """Returns how many bytes a fused computation writes of each of its results; None: all of them."""
        body = self.computations[computation]
        root = next(instruction for instruction in body.values() if instruction.is_root)
        names = root.operands if root.opcode == 'tuple' else [root.name]
        return [written for name in names for written in self._updated(computation, name)]

    def _updated(self, computation: str, name: str) -> list[int | None]:
        body = self.computations[computation]
        total, instruction = 0, body[name]
        while instruction.opcode in ('bitcast', 'dynamic-update-slice'):
            if instruction.opcode == 'dynamic-update-slice':
                total += sum(array.bytes for array in body[instruction.operands[1]].result)
            instruction = body[instruction.operands[0]]
        if instruction.opcode == 'fusion' and not total:
            return self._written(instruction.called[0])
        # What is updated in place was there before; anything else is written whole.
        return [total if instruction.opcode == 'parameter' and total else None] * len(body[name].result)


def _at_most(held: int, part: int | None) -> int:
    return held if part is None else min(held, part)


def _bytes(arrays: Sequence[Array], spaces: frozenset[int]) -> int:
    return sum(array.bytes for array in arrays if array.memory_space in spaces)


def _parse(line: str) -> Instruction:
    left, _, right = line.strip().partition(' = ')
    # The result is one word, or a tuple in (nested) parentheses.
    end = _closing(right, 0) + 1 if right.startswith('(') else right.index(' ')
    opened = right.index('(', end)
    closed = _closing(right, opened)
    opcode, inside, rest = right[end:opened].strip(), right[opened + 1 : closed], right[closed + 1 :]
    return Instruction(
        name=left.removeprefix('ROOT ').removeprefix('%'),
        opcode=opcode,
        result=tuple(_array(match) for match in _ARRAY.findall(right[:end])),
        operands=tuple(re.findall(r'%([\w.\-]+)', inside)),
        attributes=inside if opcode in ('constant', 'parameter') else rest,
        is_root=left.startswith('ROOT '),
    )


def _closing(text: str, opened: int) -> int:
    depth = 0
    for place in range(opened, len(text)):
        depth += {'(': 1, ')': -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f'unbalanced parentheses: {text[:200]}')


def _array(match: tuple[str, str, str]) -> Array:
    dtype, shape, layout = match
    space = re.search(r'S\((\d+)\)', layout)
    return Array(dtype, tuple(int(n) for n in shape.split(',') if n), int(space[1]) if space else 0)


def _group_size(attributes: str) -> int:
    """Devices that speak with each other, from any of the ways to write replica groups; permutes count as 2.

    Raises:
      ValueError: they are written in yet another way; communication must not go uncounted.
    """
    if 'source_target_pairs=' in attributes:
        return 2
    axes = re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}', attributes)
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        # An axis by its name, or a part of it as name:(size of what is before it)size.
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(size or sizes[name]) for name, size in used)
    iota = re.search(r'replica_groups=\[(\d+(?:,\d+)*)\]', attributes)
    if iota:
        return int(iota[1].split(',')[-1])
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
    if not listed:
        raise ValueError(f'cannot read the replica groups of {attributes[:300]}')
    return len(listed[1].split(','))
