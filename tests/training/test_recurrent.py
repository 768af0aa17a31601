"""optimizer.segment_tokens: rows read a segment at a time have the loss and the gradient of whole rows."""

import jax
import numpy as np
import pytest

from gau.errors import UserError
from gau.objectives import objective as objectives
from gau.training.config import resolve
from gau.training.recurrent import Recurrent
from gau.training.setup import Run
from tests.models.tiny import compile_fast, make, tokens
from tests.numerics import float64, max_error, normal
from tests.training.tiny import tiny_config

# Chunks have 5 tokens.
CONTEXT = 24
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ('name', 'segment', 'fields'),
    [
        ('flash', 8, {'num_layers': 1}),
        pytest.param('flash', 12, {'decay_gate': 'scalar', 'short_convolution': 2}, marks=SLOW),
        pytest.param('flash', 3, {'decay_gate': 'scalar', 'layer_stack': 'scan', 'remat': 'full'}, marks=SLOW),
        # As configs/lm.py has it.
        pytest.param('flash', 4, {'decay_gate': 'scalar', 'key_input': 'shifted', 'local_window': 2}, marks=SLOW),
        pytest.param('flash', 4, {'far_chunks': 1, 'num_layers': 1}, marks=SLOW),
        pytest.param('mc_transformer_plus_plus', 8, {}, marks=SLOW),
        pytest.param('performer', 8, {}, marks=SLOW),
    ],
)
def test_the_gradient_is_that_of_the_whole_row(name, segment, fields):
    with float64():
        model, params = make(name, context=CONTEXT, **fields)
        batch = {'inputs': tokens(2), 'targets': tokens(2, seed=4), 'weights': normal(5, 2, CONTEXT)}
        whole, parts = (
            compile_fast(jax.value_and_grad(lambda params, own=own: own.loss(model, params, batch)[0]))(params)
            for own in (objectives.load('lm'), Recurrent(objectives.load('lm'), segment))
        )
        assert max_error(parts, whole) < 1e-11
        # The state's share of it: keys of the global branch have no other gradient.
        assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(whole[1]))


@pytest.mark.slow
def test_a_step_is_that_of_the_whole_row_in_less_memory():
    found = []
    for segment in (None, 32):
        fields = {'data__context': 512, 'data__attend_across_documents': True, 'optimizer__segment_tokens': segment}
        run = Run.from_config(resolve(tiny_config(**fields)))
        state = run.init_state()
        batch = run.put_batch(next(run.objective.train_batches(run.config.data, tokenizer=run.tokenizer, seed=0)))
        with run.context():
            compiled = run.train_step().lower(state, batch).compile()
            _, metrics = compiled(state, batch)
        found.append((metrics['loss'], metrics['grad_norm'], compiled.memory_analysis().temp_size_in_bytes))
    whole, parts = found
    np.testing.assert_allclose(parts[:2], whole[:2], rtol=1e-4)
    assert parts[2] < whole[2] / 3


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'optimizer__segment_tokens': 0}, 'must be positive'),
        ({'optimizer__segment_tokens': 20}, 'segment_tokens=20 must divide data.context=48'),
        ({'data__attend_across_documents': False}, 'needs data.attend_across_documents=True, this is False'),
        ({'model__dropout_rate': 0.1}, 'needs model.dropout_rate=0'),
        ({'model__far_chunks': 2}, 'that of model.far_chunks=2 grows with the row'),
        ({'model__name': 'transformer', 'model__chunk_size': None, 'model__query_key_dim': None}, 'grows with the row'),
        ({'mesh__sequence': 2}, 'needs mesh.sequence=1'),
    ],
)
def test_what_is_refused(fields, message):
    fields = {'optimizer__segment_tokens': 16, 'data__attend_across_documents': True} | fields
    with pytest.raises(UserError, match=message):
        resolve(tiny_config(**fields))
