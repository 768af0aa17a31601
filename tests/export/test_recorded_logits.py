"""Parity where PyTorch is not installed: our logits against those that the exported PyTorch code computed.

    python -m tests.export.test_recorded_logits     records them anew; needs requirements-export.txt

The record names the code that made it by its hash, so that it cannot change without being compared again.
(`test_modeling.py` compares the two directly, in every model and field.)
"""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gau.export.huggingface import CODE
from tests.export.parity import LAYOUTS
from tests.models.tiny import apply, make, positions_of, tokens

RECORD = Path(__file__).with_name('recorded_logits.json')
CASES = {
    'flash': ('flash', 'lm', {}),
    'flash, gated': (
        *('flash', 'lm'),
        {'key_input': 'shifted', 'decay_gate': 'scalar', 'local_window': 2, 'absolute_position': 'none'},
    ),
    'flash, masked': ('flash', 'mlm', {'key_input': 'shifted'}),
    'flash_quad': ('flash_quad', 'lm', {'key_input': 'own'}),
    'transformer_plus_plus': ('transformer_plus_plus', 'lm', {'short_convolution': 3}),
}
# Documents and padding.
IDS_BN = np.array([LAYOUTS[layout] for layout in ('packed', 'holes', 'a chunk of padding')])
# Two layers of a kind say no more than one.
FIELDS = {'dtype': 'float32', 'num_layers': 1}


def recorded():
    """Returns what the record should hold."""
    import torch

    from tests.export.parity import both

    tokens_BN, positions_BN, ids_BN = (torch.tensor(np.asarray(x)) for x in inputs())
    logits = {}
    for case, (name, objective, fields) in CASES.items():
        _, _, theirs = both(name, objective, **FIELDS, **fields)
        logits_BNV = theirs(tokens_BN, position_ids=positions_BN, segment_ids=ids_BN).logits
        logits[case] = np.round(logits_BNV.detach().numpy()[IDS_BN > 0].astype(float), 7).tolist()
    return {'code': digest(), 'logits': logits}


def inputs():
    return tokens(len(IDS_BN)), positions_of(IDS_BN), IDS_BN


def digest():
    return hashlib.sha256(b''.join(path.read_bytes() for path in CODE)).hexdigest()


def test_the_record_is_of_the_code_as_it_is():
    assert json.loads(RECORD.read_text())['code'] == digest(), 'python -m tests.export.test_recorded_logits'


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_pytorch(case):
    name, objective, fields = CASES[case]
    model, params = make(name, objective, **FIELDS, **fields)
    tokens_BN, positions_BN, ids_BN = inputs()
    found_BNV = np.asarray(apply(model, params, tokens_BN, jnp.asarray(ids_BN), positions_BN))
    wanted_MV = np.asarray(json.loads(RECORD.read_text())['logits'][case])
    assert np.abs(wanted_MV).max() > 0.1
    assert np.abs(found_BNV[IDS_BN > 0] - wanted_MV).max() < 1e-5


if __name__ == '__main__':
    RECORD.write_text(json.dumps(recorded()) + '\n')
