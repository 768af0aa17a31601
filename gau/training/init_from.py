"""A run that starts from exported weights: `config.init_from`, a directory of `scripts/export.py`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from gau.errors import UserError
from gau.models.weights import restored

WEIGHTS = 'model.safetensors'


def with_exported(params: Any, wanted: Any, directory: Path) -> tuple[Any, list[str]]:
    """Returns parameters with those of an export in the place of the language model's.

    The language model must fit whole; what stands around it, another head, stays as it is.

    Args:
      params: the new run's parameters as they are drawn; or None, only to check.
      wanted: their tree of jax.ShapeDtypeStruct with shardings.
      directory: of `scripts/export.py`, with the format safetensors or huggingface.

    Returns:
      The parameters on the shardings of `wanted`, and the names of the parts that were left as drawn.

    Raises:
      UserError: safetensors is missing, the directory is no export, the model has no language model in it, or the
        weights do not fit.
    """
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise UserError('init_from needs safetensors: pip install -r requirements-export.txt') from error
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(f'init_from={directory} is no export of scripts/export.py: {WEIGHTS} is missing')
    try:
        weights = load_file(path)
    except Exception as error:  # The library promises no type.
        raise UserError(f'init_from={directory}: {path} cannot be read ({error})') from error
    inside, outside = _language_model(wanted)
    if inside is None:
        raise UserError(f'init_from={directory}: there is no language model in the model of the config')
    tree = wanted
    for name in inside:
        tree = tree[name]
    found = restored(weights, tree, where=f'init_from={directory}')
    return None if params is None else _placed(params, wanted, inside, found), outside


def _language_model(wanted: Any, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...] | None, list[str]]:
    """Returns where in the tree the language model is, and what stands beside it on the way there."""
    if 'embedding' in wanted:
        return path, []
    for name, part in wanted.items():
        if isinstance(part, dict):
            inside, outside = _language_model(part, (*path, name))
            if inside is not None:
                return inside, ['/'.join((*path, other)) for other in sorted(wanted) if other != name] + outside
    return None, []


def _placed(params: Any, wanted: Any, inside: tuple[str, ...], found: Any) -> Any:
    if inside:
        name = inside[0]
        return {**params, name: _placed(params[name], wanted[name], inside[1:], found)}

    def place(leaf: jax.ShapeDtypeStruct, value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return jax.tree.map(place, wanted, found)
