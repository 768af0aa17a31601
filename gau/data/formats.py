"""How documents become rows: the one place where the pipeline asks what a row is for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gau.data import examples, labelled, masking
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How documents become rows.

    Attributes:
      name: as in `config.objective`; the section `config.data.NAME`, if there is one, is its own.
      packing: what `data.packing` is unless it is given.
      frame: places that a document takes beside its own tokens.
      columns: (data config, tokenizer, whether sizes are wanted) -> the map from documents to the columns of
        `gau.data.examples`; with `draws` it takes a generator too.
      draws: whether the map is random.
      weights: (columns [..., c], whether a place is no padding) -> the weights of the targets.
      spells: whether the targets are the text in order, so that its bytes and words can be counted by target.
      causal: whether a model does not see the padding after a row's end.
    """

    name: str
    packing: str
    frame: int
    columns: Callable[[ConfigDict, Tokenizer, bool], Callable[..., Any]]
    draws: bool
    weights: Callable[[np.ndarray, np.ndarray], np.ndarray]
    spells: bool
    causal: bool


_FORMATS = {
    'lm': RowFormat(
        'lm',
        packing='concat',
        frame=1,
        columns=lambda config, tokenizer, sizes: examples.lm_columns(tokenizer, sizes=sizes),
        draws=False,
        weights=lambda table, real: real,
        spells=True,
        causal=True,
    ),
    'mlm': RowFormat(
        'mlm',
        packing='first_fit',
        frame=2,
        columns=lambda config, tokenizer, sizes: masking.mlm_columns(config.mlm, tokenizer),
        draws=True,
        weights=lambda table, real: table[..., examples.WEIGHTS],
        spells=False,
        causal=False,
    ),
    'classification': RowFormat(
        'classification',
        packing='document',
        frame=2,
        columns=lambda config, tokenizer, sizes: labelled.columns(config, tokenizer),
        draws=False,
        weights=lambda table, real: table[..., examples.WEIGHTS],
        spells=False,
        causal=False,
    ),
}


def get(objective: str | RowFormat) -> RowFormat:
    """Returns the format of a name; a RowFormat is one already.

    Raises:
      UserError: an unknown name.
    """
    if isinstance(objective, RowFormat):
        return objective
    if objective not in _FORMATS:
        raise UserError(f'objective="{objective}" is unknown{did_you_mean(objective, _FORMATS)}')
    return _FORMATS[objective]
