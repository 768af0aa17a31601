"""Where the cycles and bytes of a compiled step go: by part of the model, and by operation.

The compiler names a fused kernel after one of the operations in it, so what is fused stands where that one stands.
"""

import re
from collections import defaultdict
from typing import NamedTuple

from gau.benchmarks.hlo import MAIN_MEMORY, ON_CHIP, Instruction, Program

# Components of a name that stand for JAX's own constructs and not for a part of the model.
_CONSTRUCTS = re.compile(
    r'while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|branch_\d+_fun|vmap\(\)'
)
MIB = 2**20


class Place(NamedTuple):
    """Where in a step an instruction belongs.

    Attributes:
      direction: 'forward', 'backward' or, for what belongs to neither, 'step'; with recomputation, 'recompute'.
      part: modules of the model, layers taken together; 'loss', with the head; 'update', of the parameters; 'unnamed',
        what the compiler put in by itself, copies above all.
      operation: as JAX names it, an einsum by its formula; what is unnamed by its opcode.
    """

    direction: str
    part: str
    operation: str


class Cost(NamedTuple):
    """What instructions cost in a step.

    Attributes:
      kernels: how many run.
      cycles: as the compiler estimates them.
      unknown: kernels among them without an estimate.
      memory_bytes: traffic of main memory.
      on_chip_bytes: traffic of memory on the chip.
    """

    kernels: int = 0
    cycles: int = 0
    unknown: int = 0
    memory_bytes: int = 0
    on_chip_bytes: int = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        """Returns the sum of both."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def place(instruction: Instruction) -> Place:
    """Returns where an instruction belongs, from the name that JAX gave it."""
    *path, operation = instruction.source.split('/')
    if not path:
        return Place('step', 'unnamed', instruction.opcode)
    direction = next((word for mark, word in _DIRECTIONS.items() if mark in instruction.source), 'step')
    parts = []
    for component in path:
        if re.search(r'->', component):
            operation = component
        elif re.fullmatch(r'[a-z]\w*', component) and not _CONSTRUCTS.fullmatch(component):
            parts.append(re.sub(r'_\d+$', '', component))
    # A scan of layers cuts and fills its stacks outside of any layer.
    outside = 'blocks' if '._stack' in instruction.source else 'update' if direction == 'step' else 'loss'
    return Place(direction, '/'.join(parts) or outside, operation)


_DIRECTIONS = {'rematted_computation': 'recompute', 'transpose(jvp': 'backward', 'jvp(': 'forward'}


def costs(program: Program) -> dict[Place, Cost]:
    """Returns what the instructions of each place cost in a step."""
    found: dict[Place, Cost] = defaultdict(Cost)
    for instruction, where, times in program.runs:
        cycles = instruction.estimated_cycles
        memory, on_chip = (program.instruction_traffic(instruction, where, space) for space in (MAIN_MEMORY, ON_CHIP))
        if cycles == 0 and not memory and not on_chip:
            continue
        cost = Cost(1, cycles or 0, cycles is None, memory, on_chip)
        found[place(instruction)] += Cost(*(times * number for number in cost))
    return dict(found)


def describe(program: Program, clock: float | None, rows: int = 24) -> str:
    """Returns the costs as two tables, the most expensive first.

    Args:
      program: the compiled step.
      clock: cycles per second, or None: the compiler estimates no cycles, and bytes decide the order.
      rows: of each table; what is left is summed up in one more.
    """
    found = costs(program)
    blocks = []
    for title, key in (
        ('part of the model', lambda at: (at.direction, at.part)),
        ('operation', lambda at: (at.direction, f'{at.part.rpartition("/")[2]}: {at.operation}')),
    ):
        grouped: dict[tuple[str, str], Cost] = defaultdict(Cost)
        for at, cost in found.items():
            grouped[key(at)] += cost
        ordered = sorted(grouped.items(), key=lambda item: (item[1].cycles, item[1].memory_bytes), reverse=True)
        left = sum((cost for _, cost in ordered[rows:]), Cost())
        ordered = ordered[:rows] + ([(('', f'{len(ordered) - rows} more'), left)] if len(ordered) > rows else [])
        ordered.append((('', 'all'), sum(found.values(), Cost())))
        blocks.append(_table(title, ordered, clock))
    return '\n\n'.join(blocks)


def _table(title: str, rows: list[tuple[tuple[str, str], Cost]], clock: float | None) -> str:
    total = rows[-1][1].cycles or 1
    lines = [f'{"direction":10} {title:44} {"kernels":>7} {"ms":>8} {"%":>6} {"memory MiB":>11} {"on-chip MiB":>11}']
    for (direction, name), cost in rows:
        name = name if len(name) <= 44 else '...' + name[-41:]
        ms = f'{1e3 * cost.cycles / clock:8.3f}' if clock and cost.cycles else f'{"-":>8}'
        # Kernels of which the compiler says nothing.
        ms, share = ms + ('?' if cost.unknown else ' '), f'{100 * cost.cycles / total:4.1f}'
        bytes_ = f'{cost.memory_bytes / MIB:11,.1f} {cost.on_chip_bytes / MIB:11,.1f}'
        lines.append(f'{direction:10} {name:44} {cost.kernels:7} {ms}{share:>6} {bytes_}')
    return '\n'.join(lines)
