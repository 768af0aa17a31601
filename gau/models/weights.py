"""The parameters of a language model under stable names, as NumPy arrays: how they leave and come back.

The names and layouts are those of PyTorch's modules, so that one file serves both sides:

    ours                                            theirs
    embedding/kernel [V, D]                         embedding.weight [V, D]
    blocks_3/gau/uv/kernel [D, 2, E], bias [2, E]   blocks.3.gau.uv.weight [2 E, D], bias [2 E]
    blocks_3/gau/query_key/gamma [R, H, S]          blocks.3.gau.query_key.gamma [R, H, S]
    final_norm/scale                                final_norm.scale
    output/kernel [V, D]                            output.weight [V, D]

Scanned layers (`blocks/...` with a first axis of layers) have the names of unrolled ones.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gau.errors import UserError

Leaves = dict[tuple[str, ...], Any]

# Names that PyTorch's layers have, and one that is a word of Python's, which code about attributes stumbles over.
_RENAMED = {'kernel': 'weight', 'in': 'inner'}


def named(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of a `LanguageModel` by their stable names; the dtypes stay."""
    leaves = _leaves(params)
    result = {}
    for path, leaf in leaves.items():
        if path[0] == 'blocks':
            layers = ((('blocks', str(layer), *path[1:]), leaf[layer]) for layer in range(leaf.shape[0]))
            scanned = True
        else:
            layers, scanned = [(_unrolled(path), leaf)], False
        size = _bias_size(leaves, path, scanned)
        for names, value in layers:
            result[_name(names)] = _outward(names, np.asarray(value), size)
    return result


def restored(weights: Mapping[str, np.ndarray], wanted: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Undoes `named`: returns the tree of parameters, in the layout and the dtypes of `wanted`.

    Args:
      weights: by stable name.
      wanted: tree of a `LanguageModel` with shapes and dtypes, of unrolled or scanned layers.
      where: what the weights came from, for the error.

    Raises:
      UserError: a weight is missing, is one too many or has another shape; the first one is named.
    """
    leaves = _leaves(wanted)
    expected: dict[str, tuple[tuple[str, ...], int | None]] = {}
    for path, leaf in leaves.items():
        if path[0] == 'blocks':
            for layer in range(leaf.shape[0]):
                names = ('blocks', str(layer), *path[1:])
                expected[_name(names)] = path, layer
        else:
            names = _unrolled(path)
            expected[_name(names)] = path, None
    for name in sorted(expected.keys() ^ weights.keys(), key=_by_number):
        lacks = 'the new model has no such part' if name in weights else 'the new model needs it'
        there = list(weights[name].shape) if name in weights else 'absent'
        raise UserError(f'{where} does not fit the config: {name} is {there} there, and {lacks}')
    tree: dict[str, Any] = {}
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    # Another width or vocabulary shows in the embedding: it comes first.
    for name in sorted(expected, key=lambda name: name != 'embedding.weight'):
        path, layer = expected[name]
        shape = leaves[path].shape if layer is None else leaves[path].shape[1:]
        value = weights[name]
        outputs = _bias_size(leaves, path, layer is not None)
        outward = _outward_shape(path, shape, outputs)
        if value.shape != outward:
            raise UserError(
                f'{where} does not fit the config: {name} is {[*value.shape]} there and {[*outward]} in the config'
            )
        value = (value.T if outputs and path[-1] == 'kernel' else value).reshape(shape)
        if layer is None:
            _put(tree, path, value.astype(leaves[path].dtype))
        else:
            stacks.setdefault(path, []).append(value)
    for path, layers in stacks.items():
        _put(tree, path, np.stack(layers).astype(leaves[path].dtype))
    return tree


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Leaves:
    leaves: Leaves = {}
    for name, value in tree.items():
        leaves |= _leaves(value, (*path, name)) if isinstance(value, Mapping) else {(*path, name): value}
    return leaves


def _unrolled(path: tuple[str, ...]) -> tuple[str, ...]:
    match = re.fullmatch(r'blocks_(\d+)', path[0])
    return ('blocks', match[1], *path[1:]) if match else path


def _name(names: tuple[str, ...]) -> str:
    return '.'.join(_RENAMED.get(name, name) for name in names)


def _bias_size(leaves: Leaves, path: tuple[str, ...], scanned: bool) -> int | None:
    """Returns how many outputs the dense layer of a parameter has; None if it is of no dense layer."""
    bias = leaves.get((*path[:-1], 'bias'))
    if bias is None or (*path[:-1], 'kernel') not in leaves:
        return None
    return int(np.prod(bias.shape[scanned:]))


def _outward_shape(path: tuple[str, ...], shape: tuple[int, ...], outputs: int | None) -> tuple[int, ...]:
    if outputs is None:
        return tuple(shape)
    return (outputs, int(np.prod(shape)) // outputs) if path[-1] == 'kernel' else (outputs,)


def _outward(path: tuple[str, ...], value: np.ndarray, outputs: int | None) -> np.ndarray:
    if outputs is None:
        return value
    # The input axes of a kernel come first.
    return np.ascontiguousarray(value.reshape(-1, outputs).T) if path[-1] == 'kernel' else value.reshape(-1)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _by_number(name: str) -> list[Any]:
    return [(0, int(part), '') if part.isdecimal() else (1, 0, part) for part in name.split('.')]
