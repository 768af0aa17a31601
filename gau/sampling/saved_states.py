"""Decoding states in files: a long document is read once and gone on from many times.

A file is one of `numpy.savez`, with a header in JSON that says which model and which parameters made the state.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gau.errors import UserError
from gau.models import decoding
from gau.sampling.generation import Prefilled

# Of the file and of the arrays in a state; another one when either changes.
LAYOUT = 2
# Fields of a model's config that say how it is computed and not what.
_HOW = ('impl', 'remat', 'vocab_loss_slice')


def save(path: str | Path, model: nn.Module, params: Any, prefilled: Prefilled) -> None:
    """Writes what has been read of one row to a file.

    Raises:
      UserError: there is such a file; it cannot be written.
    """
    path, position = Path(path), int(prefilled.state['position'].max())
    check_new(path)
    state = decoding.with_capacity(model, prefilled.state, position)
    names, leaves = _named(Prefilled(state, prefilled.logits_BV))
    header = {'layout': LAYOUT, 'tokens': position, **_maker(model, params)}
    arrays = {name: _bytes(leaf) for name, leaf in zip(names, leaves, strict=True)}
    part = path.with_name(f'{path.name}.part')
    try:
        with part.open('wb') as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f'{path} cannot be written: {error.strerror or error}') from error


def check_new(path: str | Path) -> None:
    """Raises UserError where a state cannot be saved: something is there already, or there is no such directory."""
    if Path(path).exists():
        raise UserError(f'{path} exists; give another name for the state')
    if not Path(path).parent.is_dir():
        raise UserError(f'{path} cannot be written: there is no directory {Path(path).parent}')


def load(path: str | Path, model: nn.Module, params: Any) -> Prefilled:
    """Returns the row of a file of `save`.

    Raises:
      UserError: no such file, none of a state, or one of another model, other parameters or another layout.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(str(arrays.pop('header')))
        layout, made_by = header['layout'], header.get('model')
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or "is no decoding state"}') from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path} is no decoding state') from error
    if layout != LAYOUT:
        raise UserError(f'{path} has a state in layout {layout}, this is layout {LAYOUT}: read the text again')
    tokens = header.get('tokens')
    if not isinstance(made_by, dict) or not isinstance(tokens, int) or tokens < 1:
        raise UserError(f'{path} is no decoding state')
    maker = _maker(model, params)
    for field, value in maker['model'].items():
        # A field that the file lacks is newer than it, and has its default in every run of that time.
        if made_by.get(field, value) != value:
            raise UserError(f'{path} is the state of another model: {field}={made_by[field]}, this one has {value}')
    if header.get('parameters') != maker['parameters']:
        raise UserError(f'{path} is the state of other parameters: of another run, or of another step of it')
    like = jax.eval_shape(
        lambda: Prefilled(
            decoding.init_state(model, batch_size=1, capacity=tokens),
            jnp.zeros((1, model.vocab_size), jnp.promote_types(model.config.dtype, jnp.float32)),
        )
    )
    names, leaves = _named(like)
    if sorted(names) != sorted(arrays):
        raise UserError(f'{path} has the arrays of another model')
    loaded = []
    for name, leaf in zip(names, leaves, strict=True):
        try:
            loaded.append(jnp.asarray(arrays[name].view(leaf.dtype).reshape(leaf.shape)))
        except (TypeError, ValueError) as error:
            raise UserError(f'{path}: {name} is no {leaf.dtype} {list(leaf.shape)}') from error
    return jax.tree.unflatten(jax.tree.structure(like), loaded)


def _named(prefilled: Prefilled) -> tuple[list[str], list[Any]]:
    paths = jax.tree_util.tree_leaves_with_path(prefilled)
    return [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in paths], [leaf for _, leaf in paths]


def _bytes(leaf: jax.Array) -> np.ndarray:
    """Returns an array as bytes, [..., bytes of the last dimension]: NumPy has no file format for bfloat16."""
    return np.ascontiguousarray(np.atleast_1d(np.asarray(leaf))).view(np.uint8)


def _maker(model: nn.Module, params: Any) -> dict[str, Any]:
    """Returns what must be the same for a state to mean the same."""
    fields = {name: value for name, value in model.config.items() if name not in _HOW}
    fields |= {'vocab_size': model.vocab_size}
    digest = hashlib.sha256()
    # All of them: of two runs, or two steps of one, some may be alike (`optimizer.frozen`).
    for leaf in jax.tree.leaves(params):
        digest.update(_bytes(leaf).ravel())
    return {'model': json.loads(json.dumps(fields, default=str)), 'parameters': digest.hexdigest()}
