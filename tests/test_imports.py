"""Imports run one way: ops <- kernels <- layers <- models <- training and the rest; nobody imports the experiments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each room, lowest first, and what it knows of `gau` besides the rooms that belong to nobody.
ROOMS = {
    'gau.ops.kernels': {'gau.ops', 'gau.ops.kernels'},
    'gau.ops': {'gau.ops'},
    'gau.layers': {'gau.ops', 'gau.ops.kernels', 'gau.layers'},
    'gau.models': {'gau.ops', 'gau.ops.kernels', 'gau.layers', 'gau.models'},
}
SHARED = {'gau.errors', 'gau.imports'}


def room_of(module):
    """The innermost of ROOMS that a module belongs to, or the module's own first two names."""
    inside = [room for room in ROOMS if module == room or module.startswith(f'{room}.')]
    return max(inside, key=len, default='.'.join(module.split('.')[:2]))


def imports(path):
    """Every module of `gau` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith('gau.'))
        elif isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'gau':
            # Of `from gau.ops import kernels` the module may be the name.
            for name in node.names:
                module = ROOT.joinpath(*node.module.split('.'), name.name)
                is_module = module.is_dir() or module.with_suffix('.py').exists()
                yield f'{node.module}.{name.name}' if is_module else node.module


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_knows_only_those_below_it(room):
    files = [path for path in (ROOT / Path(*room.split('.'))).rglob('*.py')]
    found = 0
    for path in files:
        module = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        if room_of(module) != room:
            continue
        for imported in imports(path):
            found += 1
            assert room_of(imported) in ROOMS[room] | SHARED, f'{module} imports {imported}'
    assert found
