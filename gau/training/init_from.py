"""A run that starts from the weights of another run or of an export: `config.init_from`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from gau.data.tokenizers import Tokenizer
from gau.errors import UserError
from gau.models.weights import named, restored
from gau.training import workdir as files
from gau.training.checkpoints import Checkpoints
from gau.training.load import check_tokenizer

WEIGHTS = 'model.safetensors'


def with_pretrained(
    params: Any, wanted: Any, source: Path, *, tokenizer: Tokenizer | None = None
) -> tuple[Any, list[str]]:
    """Returns parameters with those of another run or of an export in the place of the language model's.

    The language model must fit whole; what stands around it, another head, stays as it is, and takes the place of an
    output layer that is not the embedding.

    Args:
      params: the new run's parameters as they are drawn; or None, only to check.
      wanted: their tree of jax.ShapeDtypeStruct with shardings.
      source: a work directory, one of its checkpoints, or a directory of `scripts/export.py` with the format
        safetensors or huggingface.
      tokenizer: of the new run; a run that was trained with another one is refused.

    Returns:
      The parameters on the shardings of `wanted`, and the names of the parts that were left as drawn.

    Raises:
      UserError: safetensors is missing, the directory is neither, there is no language model in either model, or the
        weights do not fit.
    """
    inside, outside = _language_model(wanted)
    if inside is None:
        raise UserError(f'init_from={source}: there is no language model in the model of the config')
    tree = wanted
    for name in inside:
        tree = tree[name]
    weights = _exported(source) if (source / WEIGHTS).is_file() else _checkpointed(source, tokenizer)
    if inside and 'output' not in tree:
        # What stands around the language model here reads its hidden states.
        weights.pop('output.weight', None)
    found = restored(weights, tree, where=f'init_from={source}')
    return None if params is None else _placed(params, wanted, inside, found), outside


def _exported(directory: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise UserError('init_from needs safetensors: pip install -r requirements-export.txt') from error
    path = directory / WEIGHTS
    try:
        return load_file(path)
    except Exception as error:  # The library promises no type.
        raise UserError(f'init_from={directory}: {path} cannot be read ({error})') from error


def _checkpointed(source: Path, tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    """Returns the language model in a checkpoint by stable names, whatever head it was trained with."""
    workdir, step = files.checkpoint_of(source)
    if not (workdir / files.CONFIG).is_file():
        raise UserError(
            f'init_from={source} is neither a work directory, nor a checkpoint in one, nor an export of '
            f'scripts/export.py ({WEIGHTS} is missing)'
        )
    trained = files.read_config(workdir)
    saved = Checkpoints(workdir)
    try:
        chosen = saved.chosen(step, where=f'init_from={source}')
        if tokenizer is not None:
            check_tokenizer(tokenizer, trained.data.tokenizer, saved.meta(chosen).get('data', {}).get('tokenizer'))
        params = saved.read_params(chosen)
    finally:
        saved.close()
    inside, _ = _language_model(params)
    if inside is None:
        raise UserError(f'init_from={source}: there is no language model in it')
    for name in inside:
        params = params[name]
    return named(params)


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
