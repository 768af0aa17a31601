"""Masked language modelling: which tokens are to be predicted, and what the model sees in their place.

Tokens are chosen in groups: single tokens, whole words, or spans of random length into which the document is cut. The
groups are visited in random order until `rate` of the tokens is reached; the group that would overshoot is taken with
the chance that makes the expected share exactly `rate`. No loop over tokens.
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from gau.data.documents import Document
from gau.data.examples import INPUTS, TARGETS, WEIGHTS, Columns, framed
from gau.data.tokenizers import Tokenizer


def mlm_columns(config: ConfigDict, tokenizer: Tokenizer) -> Callable[[Document, np.random.Generator], Columns]:
    """Returns the random map for masked language modelling; targets are the document in its frame of BOS and EOS.

    Args:
      config: the resolved `data.mlm`.
      tokenizer: gives MASK, the ordinary tokens and where words begin.

    Returns:
      A function of a document and a generator; what it draws depends on the generator's state only, and Grain seeds
      that by the document's index, counted through all epochs.
    """
    ordinary = np.flatnonzero(tokenizer.ordinary).astype(np.int32)

    def columns(document: Document, rng: np.random.Generator) -> Columns:
        frame = framed(document, tokenizer)
        chosen = np.zeros(len(frame), bool)
        # BOS and EOS are never predicted: they are given away by their place.
        chosen[1:-1] = choose(frame[1:-1], config, tokenizer, rng)
        places = np.flatnonzero(chosen)
        fate = rng.random(len(places))
        masked = places[fate < config.mask_share]
        random = places[(fate >= config.mask_share) & (fate < config.mask_share + config.random_share)]
        table = np.empty((len(frame), 3), np.int32)
        table[:, INPUTS], table[:, TARGETS], table[:, WEIGHTS] = frame, frame, chosen
        table[masked, INPUTS] = tokenizer.mask_id
        table[random, INPUTS] = rng.choice(ordinary, len(random))
        return {'tokens': table}

    return columns


def choose(tokens: np.ndarray, config: ConfigDict, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """Returns which of a document's `tokens` (int32 [n]) are to be predicted, bool [n]."""
    n = len(tokens)
    if n == 0:
        return np.zeros(0, bool)
    if config.masking == 'token':
        sizes = np.ones(n, np.int64)
    elif config.masking == 'whole_word':
        begins = tokenizer.starts_word[tokens]
        begins[0] = True
        sizes = np.diff(np.append(np.flatnonzero(begins), n))
    else:
        sizes = _span_sizes(n, config, rng)
    order = rng.permutation(len(sizes))
    visited = sizes[order]
    before = np.cumsum(visited) - visited
    # Far below the budget always, far above never, and in between with the chance that makes the mean exact.
    taken = before + rng.random() * visited < config.rate * n
    wanted = np.zeros(len(sizes), bool)
    wanted[order[taken]] = True
    return np.repeat(wanted, sizes)


def _span_sizes(n: int, config: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """Cuts n tokens into spans of geometric length, at most span_max; the last one is what is left."""
    draws = np.minimum(rng.geometric(1 / config.span_mean, size=n), config.span_max)
    ends = np.cumsum(draws)
    ends = np.append(ends[ends < n], n)
    return np.diff(ends, prepend=0)
