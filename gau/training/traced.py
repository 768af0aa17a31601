"""What a traced program (a jaxpr) says before it is compiled: FLOPs, large arrays, and how activations are sharded."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


def flops(jaxpr: Any, *, custom_kernels_only: bool = False) -> int:
    """Returns the FLOPs of all matrix products of a traced program, over all devices, loops as often as they run.

    Args:
      jaxpr: the program.
      custom_kernels_only: whether to count those of Pallas kernels alone: what a kernel says that it costs, or else all
        that is inside of it, with blocks that it passes over.
    """
    equations = _equations(jaxpr.jaxpr)
    if custom_kernels_only:
        kernels = ((e, times) for e, _, times in equations if e.primitive.name == 'pallas_call')
        return sum(times * _inside(kernel) for kernel, times in kernels)
    return sum(times * _product_flops(equation) for equation, _, times in equations)


def _inside(kernel: Any) -> int:
    """FLOPs of one call of a kernel."""
    if kernel.params['cost_estimate'] is not None:
        return kernel.params['cost_estimate'].flops
    steps = math.prod(kernel.params['grid_mapping'].grid)
    return steps * sum(times * _product_flops(e) for e, _, times in _equations(kernel.params['jaxpr']))


def largest_arrays(jaxpr: Any, devices: int, number: int = 5) -> list[tuple[int, str, str]]:
    """Returns (bytes, type and shape, source) of the largest arrays that are kept, as if divided over devices."""
    sizes = {}
    for equation, source, _ in _equations(jaxpr.jaxpr):
        # What is broadcast or compared is not stored; what loops and products return is.
        if equation.primitive.name in ('scan', 'dot_general', 'gather', 'concatenate'):
            for variable in equation.outvars:
                aval = variable.aval
                sizes[_type(aval), source] = math.prod(aval.shape) * aval.dtype.itemsize // devices
    return [(size, *key) for key, size in Counter(sizes).most_common(number)]


def activations(jaxpr: Any, mesh: Mesh) -> str:
    """Returns a table of the activations that the model names to the compiler: where, whole, on one device, sharding.

    Listed are the arguments and results of `with_sharding_constraint` and `shard_map`, alike ones of several layers
    once. What lies between them the compiler decides by itself.

    Args:
      jaxpr: of a forward pass.
      mesh: its mesh.
    """
    rows = {}
    for equation, source, _ in _equations(jaxpr.jaxpr):
        if equation.primitive.name == 'sharding_constraint':
            found = [(equation.outvars[0].aval, equation.params['sharding'].spec)]
        elif equation.primitive.name == 'shard_map':
            variables = [*equation.invars, *equation.outvars]
            specs = [*equation.params['in_specs'], *equation.params['out_specs']]
            found = [(variable.aval, spec) for variable, spec in zip(variables, specs, strict=True)]
        else:
            continue
        # Layers are alike, and the names of the model's methods say nothing.
        where = re.sub(r'blocks_\d+', 'blocks_*', re.sub(r'LanguageModel\.\w+/?|/[\w*]+\._residual', '', source))
        for aval, spec in found:
            rows[where or 'residual stream', _type(aval), _on_one_device(aval, spec, mesh), str(tuple(spec))] = None
    header = ('Activation', 'Whole', 'On one device', 'Sharding')
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def _on_one_device(aval: Any, spec: PartitionSpec, mesh: Mesh) -> str:
    shape = []
    for size, entry in zip(aval.shape, (*spec, *(None,) * len(aval.shape)), strict=False):
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        shape.append(-(-size // math.prod(mesh.shape[axis] for axis in axes)))
    return f'[{",".join(map(str, shape))}]'


def _type(aval: Any) -> str:
    return f'{aval.dtype}[{",".join(map(str, aval.shape))}]'


def _equations(jaxpr: Any, source: str = '', times: int = 1) -> Iterator[tuple[Any, str, int]]:
    """Every equation, where in the model it stands, and how often it runs: inside a `shard_map` on every device."""
    for equation in jaxpr.eqns:
        where = '/'.join(part for part in (source, str(equation.source_info.name_stack)) if part)
        yield equation, where, times
        inner = times
        if equation.primitive.name == 'scan':
            inner *= equation.params['length']
        if equation.primitive.name == 'pallas_call':
            inner *= math.prod(equation.params['grid_mapping'].grid)
        if equation.primitive.name == 'shard_map':
            inner *= equation.params['mesh'].size
        for sub in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            sub = getattr(sub, 'jaxpr', sub)
            if hasattr(sub, 'eqns'):
                yield from _equations(sub, where, inner)


def _product_flops(equation: Any) -> int:
    if equation.primitive.name != 'dot_general':
        return 0
    (contracted, _), _ = equation.params['dimension_numbers']
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
