"""Perplexity, with and without positions, against counting by hand."""

import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gau.data import embedded, pipeline
from gau.errors import UserError
from gau.evaluation.evaluator import Cancelled, Case
from gau.evaluation.perplexity_by_position import by_position
from gau.evaluation.perplexity_by_repetition import PerplexityByRepetition, distances
from gau.evaluation.perplexity_in_chunk import PerplexityInChunk
from gau.training import config as training_config
from gau.training.config import resolve
from gau.training.setup import Run
from tests.training.tiny import tiny_config


@pytest.fixture(scope='module')
def run():
    return Run.from_config(resolve(tiny_config(model__num_layers=1, eval__max_tokens=3000)))


def test_sums_are_those_of_the_batches_taken_one_by_one(run):
    params = run.init_state().params
    (evaluator,) = run.evaluators()
    (case,) = evaluator.cases([32])
    assert case == Case('valid_32', 'valid', 32)
    sums, metrics = evaluator.sums(params, case), dict(evaluator.measure(params, case))
    loss = tokens = bytes_ = 0.0
    positions = np.zeros(32)
    token_losses = jax.jit(lambda params, batch: run.objective.token_losses(run.model, params, batch))
    for batch in pipeline.eval_iterator(
        run.config.data,
        split='valid',
        context=32,
        batch_size=1,
        objective='lm',
        tokenizer=run.tokenizer,
        max_tokens=3000,
    ):
        nll = np.asarray(token_losses(params, batch), np.float64)
        loss += (nll * batch['weights']).sum()
        tokens += batch['weights'].sum()
        bytes_ += batch['target_bytes'].sum()
        np.add.at(positions, batch['positions'][batch['weights'] > 0], 1)
    assert metrics['loss'] == pytest.approx(loss / tokens, rel=1e-6)
    assert metrics['bits_per_byte'] == pytest.approx(loss / np.log(2) / bytes_, rel=1e-6)
    assert metrics['perplexity'] == pytest.approx(np.exp(loss / tokens), rel=1e-5)
    assert metrics['tokens'] == tokens
    np.testing.assert_array_equal(sums.by_position[1], positions)
    assert sum(row['tokens'] for row in metrics['loss_by_position']) == tokens


def test_the_loss_by_place_is_that_of_the_same_targets(run):
    params = run.init_state().params
    entry = training_config.evaluators(run.config)['eval']
    evaluator = PerplexityInChunk(run, 'chunk', ConfigDict({**entry, 'skip': 20}))
    case = Case('valid', 'valid', run.config.data.context)
    metrics, losses, tokens = dict(evaluator.measure(params, case)), np.zeros(48), np.zeros(48)
    for batch, nll_BN in evaluator.batches(params, case, lambda: False):
        losses += (nll_BN.astype(np.float64) * batch['weights']).sum(0)
        tokens += batch['weights'].sum(0)
    losses[:20] = tokens[:20] = 0
    losses, tokens = losses.reshape(3, 16).sum(0), tokens.reshape(3, 16).sum(0)
    rows = metrics['loss_by_place']
    assert [(row['first'], row['last']) for row in rows] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    for row in rows:
        places = slice(row['first'], row['last'] + 1)
        assert row['loss'] == pytest.approx(losses[places].sum() / tokens[places].sum(), rel=1e-6)
        assert row['tokens'] == tokens[places].sum()
    assert metrics['tokens'] == tokens.sum()
    assert metrics['loss'] == pytest.approx(losses.sum() / tokens.sum(), rel=1e-6)
    second_half = losses[8:].sum() / tokens[8:].sum()
    assert metrics['border_loss'] == pytest.approx(metrics['loss'] - second_half, abs=1e-6)


def test_the_loss_by_repetition_is_that_of_pairs_seen_before(run):
    params = run.init_state().params
    evaluator = PerplexityByRepetition(run, 'pairs', ConfigDict(training_config.evaluators(run.config)['eval']))
    case = Case('valid', 'valid', run.config.data.context)
    metrics, repeated, new = dict(evaluator.measure(params, case)), [], []
    for batch, nll_BN in evaluator.batches(params, case, lambda: False):
        names = 'inputs', 'targets', 'segment_ids', 'weights'
        for inputs, targets, ids, weights, nll in zip(*(batch[name] for name in names), nll_BN, strict=True):
            pairs = list(zip(ids.tolist(), inputs.tolist(), targets.tolist(), strict=True))
            for n, pair in enumerate(pairs):
                if weights[n]:
                    (repeated if pair in pairs[:n] else new).append(float(nll[n]))
    assert len(repeated) > 20
    assert metrics['repeated_loss'] == pytest.approx(np.mean(repeated), rel=1e-6)
    assert metrics['new_loss'] == pytest.approx(np.mean(new), rel=1e-6)
    rows = metrics['loss_by_distance']
    assert rows[0]['tokens'] == len(new)
    assert sum(row['tokens'] for row in rows) == metrics['tokens'] == len(new) + len(repeated)
    # The last place counts, and documents do not see each other.
    found = distances(np.asarray([1, 2, 1, 2, 1, 2]), np.asarray([2, 1, 2, 1, 2, 3]), np.asarray([1, 1, 1, 1, 2, 2]))
    np.testing.assert_array_equal(found, [0, 0, 2, 2, 0, 0])


def test_a_model_without_chunks_is_told_them(run):
    class WithoutChunks(types.SimpleNamespace):
        objective, config = run.objective, ConfigDict({**run.config, 'model': {'name': 'transformer'}})

    entry = training_config.evaluators(run.config)['eval']
    with pytest.raises(UserError, match=r'evaluators\.chunk\.chunk must be given: transformer has no chunks'):
        PerplexityInChunk(WithoutChunks, 'chunk', entry)
    assert PerplexityInChunk(WithoutChunks, 'chunk', ConfigDict({**entry, 'chunk': 256})).chunk == 256


def test_the_whole_split_has_every_byte_and_one_end_a_document():
    run = Run.from_config(resolve(tiny_config(model__num_layers=1, model__model_dim=4, data__batch_size=64)))
    run.config.eval.max_tokens = None
    texts = [text.encode() for _, text in embedded.split_text('valid')]
    (evaluator,) = run.evaluators()
    metrics = dict(evaluator.measure(run.init_state().params, Case('valid_256', 'valid', 256)))
    assert metrics['bytes'] == sum(map(len, texts))
    assert metrics['tokens'] == metrics['bytes'] + len(texts)


def test_an_evaluation_can_be_cancelled(run):
    (evaluator,) = run.evaluators()
    with pytest.raises(Cancelled):
        dict(evaluator.measure(run.init_state().params, Case('valid', 'valid', 48), cancelled=lambda: True))


def test_loss_by_position_doubles_its_ranges_to_the_end_of_a_long_text():
    tokens = np.ones(131_072)
    rows = by_position(2.0 * tokens, tokens)
    assert [(row['first'], row['last']) for row in rows[:4]] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert rows[-1] == {'first': 65_536, 'last': 131_071, 'loss': 2.0, 'tokens': 65_536}
    assert sum(row['tokens'] for row in rows) == 131_072
