"""The evaluator's sums against counting by hand."""

import numpy as np
import pytest

from gau.data import embedded, pipeline
from gau.training.config import resolve
from gau.training.evaluation import Result
from gau.training.setup import Run
from gau.training.step import token_losses
from tests.training.tiny import tiny_config


@pytest.fixture(scope='module')
def run():
    return Run.from_config(resolve(tiny_config(model__num_layers=1, eval__max_tokens=3000)))


def test_sums_are_those_of_the_batches_taken_one_by_one(run):
    params = run.init_state().params
    result = run.evaluator()(params, split='valid', context=32)
    loss = tokens = bytes_ = 0.0
    positions = np.zeros(32)
    for batch in pipeline.eval_iterator(
        run.config.data,
        split='valid',
        context=32,
        batch_size=1,
        objective='lm',
        tokenizer=run.tokenizer,
        max_tokens=3000,
    ):
        nll = np.asarray(token_losses(run.model, params, batch), np.float64)
        loss += (nll * batch['weights']).sum()
        tokens += batch['weights'].sum()
        bytes_ += batch['target_bytes'].sum()
        np.add.at(positions, batch['positions'][batch['weights'] > 0], 1)
    metrics = result.metrics()
    assert metrics['loss'] == pytest.approx(loss / tokens, rel=1e-6)
    assert metrics['bits_per_byte'] == pytest.approx(loss / np.log(2) / bytes_, rel=1e-6)
    assert metrics['perplexity'] == pytest.approx(np.exp(loss / tokens), rel=1e-5)
    assert result.tokens == tokens
    np.testing.assert_array_equal(result.position_tokens, positions)
    assert sum(row[3] for row in result.by_position()) == tokens


def test_the_whole_split_has_every_byte_and_one_end_a_document():
    run = Run.from_config(resolve(tiny_config(model__num_layers=1, model__model_dim=4, data__batch_size=64)))
    run.config.eval.max_tokens = None
    texts = [text.encode() for _, text in embedded.split_text('valid')]
    result = run.evaluator()(run.init_state().params, split='valid', context=256)
    assert result.bytes == sum(map(len, texts))
    assert result.tokens == result.bytes + len(texts)


def test_a_cancelled_evaluation_has_no_result(run):
    assert run.evaluator()(run.init_state().params, split='valid', cancelled=lambda: True) is None


def test_loss_by_position_doubles_its_ranges_to_the_end_of_a_long_text():
    tokens = np.ones(131_072)
    rows = Result('valid', 131_072, 2.0 * tokens.sum(), tokens.sum(), 0, 0, 2.0 * tokens, tokens).by_position()
    assert [row[:2] for row in rows[:4]] == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert rows[-1] == (65_536, 131_071, 2.0, 65_536)
    assert sum(row[3] for row in rows) == 131_072
