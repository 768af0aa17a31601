"""States in files: what goes on from one is what would have gone on, and a file of anything else is refused."""

import json

import jax
import numpy as np
import pytest

from gau.errors import UserError
from gau.sampling import generation, saved_states
from gau.sampling.generation import SamplingParams
from tests.models import tiny

FIELDS = {'max_tokens': 6, 'sampling': SamplingParams(0), 'seed': 0, 'block': 6}


def read(model, params, prompt, start=None):
    return generation.prefill(model, params, [np.asarray(prompt, np.int32)], max_tokens=6, start=start)


@pytest.mark.parametrize(
    ('name', 'fields'),
    [
        ('flash', {}),
        # Keys and values grow with the text, what the convolution and shifted keys remember does not.
        ('flash_quad', {'key_input': 'shifted', 'short_convolution': 3}),
        # From the middle of a chunk, in a state of two chunks, into one of four.
        ('flash', {'far_chunks': 2}),
        pytest.param('flash', {'far_chunks': 1}, marks=pytest.mark.slow),
        pytest.param('transformer_plus_plus', {}, marks=pytest.mark.slow),
    ],
)
def test_a_saved_state_goes_on_alike(name, fields, tmp_path):
    model, params = tiny.make(name, dtype='bfloat16', num_layers=1, **fields)
    before = read(model, params, [1, 2, 3, 4, 5, 6, 7])
    saved_states.save(tmp_path / 'state', model, params, before)
    after = saved_states.load(tmp_path / 'state', model, params)
    for more in ([], [8, 9]):
        # Both a copy, since the loop overwrites them.
        ways = [read(model, params, more, start.repeated(model, 1)) for start in (before, after)]
        np.testing.assert_array_equal(*(way.logits_BV for way in ways))
        ways = [next(generation.decode(model, params, way.repeated(model, 1), **FIELDS)) for way in ways]
        np.testing.assert_array_equal(*ways)
        assert ways[0].shape == (1, 6)
    at_once = read(model, params, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    np.testing.assert_allclose(at_once.logits_BV, read(model, params, [8, 9], before).logits_BV, rtol=0.05, atol=0.05)


def test_what_is_no_state_of_this_model_is_refused(tmp_path, monkeypatch):
    model, params = tiny.make('flash', dtype='float32', num_layers=1)
    path = tmp_path / 'state'
    saved_states.save(path, model, params, read(model, params, [1, 2]))
    with pytest.raises(UserError, match='state exists'):
        saved_states.save(path, model, params, read(model, params, [1, 2]))
    other, other_params = tiny.make('flash', dtype='float32', num_layers=1, chunk_size=4)
    with pytest.raises(UserError, match='another model: chunk_size=5, this one has 4'):
        saved_states.load(path, other, other_params)
    # As another step of a run with a frozen embedding has them.
    embedding = {'embedding': params['embedding']}
    with pytest.raises(UserError, match='other parameters'):
        saved_states.load(path, model, jax.tree.map(lambda x: x + 1, params) | embedding)
    with pytest.raises(UserError, match='there is no directory'):
        saved_states.check_new(tmp_path / 'nowhere' / 'state')
    with np.load(path) as file:
        arrays = dict(file)
    for field, value in (('model', None), ('tokens', '2')):
        header = json.loads(str(arrays['header'])) | {field: value}
        with (tmp_path / 'other').open('wb') as file:
            np.savez(file, **arrays | {'header': np.array(json.dumps(header))})
        with pytest.raises(UserError, match='other is no decoding state'):
            saved_states.load(tmp_path / 'other', model, params)
    monkeypatch.setattr(saved_states, 'LAYOUT', 1)
    with pytest.raises(UserError, match='layout 2, this is layout 1'):
        saved_states.load(path, model, params)
    with pytest.raises(UserError, match='No such file'):
        saved_states.load(tmp_path / 'nowhere', model, params)
    (tmp_path / 'half').write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match='half is no decoding state'):
        saved_states.load(tmp_path / 'half', model, params)
