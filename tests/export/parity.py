"""Models of the house beside the PyTorch file that is exported with them, with the same random parameters."""

import functools

import numpy as np

from gau.export.huggingface import config_of
from gau.models.weights import named
from tests.models.tiny import CONTEXT, VOCAB, make
from tests.numerics import LAYOUTS as OF_MODELS

# Also rows with whole chunks of padding (the tiny models' have 5 tokens): within a document, before and after one.
LAYOUTS = {name: ids for name, ids in OF_MODELS.items() if name != 'empty'} | {
    'a chunk of padding': [1] * 4 + [0] * 7 + [1] * 13,
    'chunks of padding first': [0] * 11 + [2] * 13,
    'chunks of padding last': [3] * 8 + [0] * 16,
}


@functools.cache
def both(name, objective='lm', dtype='float64', **fields):
    """Returns our model, its parameters and the PyTorch model, all in one type."""
    import torch

    from gau.export import modeling_gau

    model, params = make(name, objective, dtype=dtype, **fields)
    config = config_of(model.config, vocab_size=VOCAB, causal=model.causal, context=CONTEXT)
    kind = modeling_gau.GAUForCausalLM if model.causal else modeling_gau.GAUForMaskedLM
    theirs = kind(modeling_gau.GAUConfig(**config)).to(getattr(torch, dtype)).eval()
    weights = {key: torch.tensor(np.asarray(value)) for key, value in named(params).items()}
    theirs.load_state_dict(weights, strict=True)
    return model, params, theirs
