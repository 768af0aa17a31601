"""Masked language modelling: which tokens are to be predicted, and what the model sees in their place.

Tokens are chosen in groups: single tokens, whole words, or spans of random length into which the text is cut. The
groups are visited in random order until `rate` of the tokens is reached; the group that would overshoot is taken with
the chance that makes the expected share exactly `rate`. No loop over tokens.
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from gau.data.documents import Document
from gau.data.examples import INPUTS, TARGETS, WEIGHTS, Columns, framed
from gau.data.tokenizers import Tokenizer


def mlm_columns(
    config: ConfigDict, tokenizer: Tokenizer
) -> Callable[[list[Document], np.random.Generator], Columns | None]:
    """Returns the random map for masked language modelling; targets are the documents in their frames of BOS and EOS.

    Args:
      config: the resolved `data.mlm`.
      tokenizer: gives MASK, the ordinary tokens and where words begin.

    Returns:
      A function of a group of documents and a generator; what it draws depends on the generator's state only, and Grain
      seeds that by the group's index, counted through all epochs.
    """
    ordinary = np.flatnonzero(tokenizer.ordinary).astype(np.int32)

    def columns(documents: list[Document], rng: np.random.Generator) -> Columns | None:
        if not documents:
            return None
        frame, starts, ends = framed(documents, tokenizer)
        # BOS and EOS are never predicted: they are given away by their place.
        body = np.ones(len(frame), bool)
        body[starts] = body[ends] = False
        begins = np.zeros(len(frame) + 1, bool)
        begins[starts + 1] = True
        chosen = np.zeros(len(frame), bool)
        chosen[body] = choose(frame[body], begins[:-1][body], config, tokenizer, rng)
        places = np.flatnonzero(chosen)
        fate = rng.random(len(places))
        masked = places[fate < config.mask_share]
        random = places[(fate >= config.mask_share) & (fate < config.mask_share + config.random_share)]
        table = np.empty((len(frame), 3), np.int32)
        table[:, INPUTS], table[:, TARGETS], table[:, WEIGHTS] = frame, frame, chosen
        table[starts, TARGETS] = tokenizer.bos_id
        table[masked, INPUTS] = tokenizer.mask_id
        table[random, INPUTS] = rng.choice(ordinary, len(random))
        return {'tokens': table}

    return columns


def choose(
    tokens: np.ndarray,
    begins: np.ndarray,
    config: ConfigDict,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns which tokens are to be predicted, bool [n].

    Args:
      tokens: of some documents end to end, int32 [n].
      begins: whether a document begins there, bool [n]; words and spans never reach across.
      config: the resolved `data.mlm`.
      tokenizer: says where words begin.
      rng: what decides.
    """
    n = len(tokens)
    if n == 0:
        return np.zeros(0, bool)
    if config.masking == 'token':
        sizes = np.ones(n, np.int64)
    else:
        begins = begins | (tokenizer.starts_word[tokens] if config.masking == 'whole_word' else _spans(n, config, rng))
        begins[0] = True
        sizes = np.diff(np.append(np.flatnonzero(begins), n))
    order = rng.permutation(len(sizes))
    visited = sizes[order]
    before = np.cumsum(visited) - visited
    # Far below the budget always, far above never, and in between with the chance that makes the mean exact.
    taken = before + rng.random() * visited < config.rate * n
    wanted = np.zeros(len(sizes), bool)
    wanted[order[taken]] = True
    return np.repeat(wanted, sizes)


def _spans(n: int, config: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """Cuts n tokens into spans of geometric length, at most span_max; returns where they begin, bool [n]."""
    lengths = np.minimum(rng.geometric(1 / config.span_mean, size=n), config.span_max)
    ends = np.cumsum(lengths)
    begins = np.zeros(n, bool)
    begins[ends[ends < n]] = True
    return begins
