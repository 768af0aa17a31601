"""Imports run one way: ops <- kernels <- layers <- models <- training and the rest; nobody imports what is at the end.

Those are the experiments and the exports; the exports alone know the libraries of other frameworks.
"""

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


EXTRAS = {'transformers', 'onnx', 'onnxscript', 'onnxruntime', 'safetensors'}


def test_exports_and_their_libraries_stay_among_themselves():
    found = set()
    for path in (ROOT / 'gau').rglob('*.py'):
        module = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        if room_of(module) == 'gau.export':
            continue
        assert not any(room_of(imported) == 'gau.export' for imported in imports(path)), module
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            found |= {module for name in names if name.split('.')[0] in EXTRAS}
    assert found == {'gau.training.init_from'}
