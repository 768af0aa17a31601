"""Passkey: its rows read as text, and its numbers for a model that finds what is near by."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.evaluation.evaluator import Case
from gau.evaluation.passkey import Passkey
from gau.training import config as training_config
from gau.training.config import resolve
from gau.training.setup import Run
from tests.training.tiny import tiny_config

CASE = Case('valid', 'valid', 400)
LAST = 5  # bytes of a number


@pytest.fixture(scope='module')
def evaluator():
    run = Run.from_config(resolve(tiny_config(model__num_layers=1, data__context=400, eval__max_tokens=3000)))
    return passkey(run, texts=3, depths=3)


def passkey(run, **fields):
    return Passkey(run, 'passkey', ConfigDict({**training_config.evaluators(run.config)['eval'], **fields}))


def rows(evaluator):
    return [
        dict(zip(batch, row, strict=True))
        for batch in evaluator.rows(CASE, 2)
        for row in zip(*batch.values(), strict=True)
    ]


def test_a_row_tells_its_number_at_its_place_or_not_at_all(evaluator):
    decode, found = evaluator.run.tokenizer.decode, rows(evaluator)
    assert len(found) == 3 * 4
    numbers = set()
    for row, (text, depth) in zip(found, np.ndindex(3, 4), strict=True):
        read, number = decode(row['inputs']), decode(row['targets'][-LAST:])
        question = f' What is the pass key? The pass key is {number[:-1]}'
        assert number.isdecimal()
        assert read.endswith(question)
        assert row['inputs'].shape == (400,)
        np.testing.assert_array_equal(np.flatnonzero(row['weights']), range(400 - LAST, 400))
        numbers.add((text, number))
        needle = f' The pass key is {number} and no other. Remember that {number} is the pass key. '
        place = read.find(needle)
        assert (place < 0) == (depth == 0)
        if depth:
            # The text around it is the same at every depth.
            around = read.replace(needle, '')
            assert around == decode(found[4 * text + 1]['inputs']).replace(needle, '')
            room = len(around) - len(question)
            assert place == [0, round(room / 2), room][depth - 1]
            told = place + len(f' The pass key is {number}')
            assert evaluator._words.distance(text, depth - 1, 3, 400) == len(read) - (LAST - 1) - told
    assert len(numbers) == 3


def test_what_a_model_finds_that_sees_two_hundred_tokens(evaluator, monkeypatch):
    decode, first = evaluator.run.tokenizer.decode, rows(evaluator)[0]['targets']

    def outputs(params, batch):
        targets = np.asarray(batch['targets'])
        read = [decode(row[200:-LAST]) for row in np.asarray(batch['inputs'])]
        near = [decode(target[-LAST:]) in text for target, text in zip(targets, read, strict=True)]
        right = np.repeat(np.asarray(near)[:, None], LAST, axis=1)
        # Of the first text's number the last digit is never found.
        right[(targets == first).all(axis=1), -1] = False
        return np.where(right, 0.5, 2.0).astype(np.float32), right

    monkeypatch.setitem(evaluator.__dict__, '_outputs', outputs)
    metrics = dict(evaluator.measure(None, CASE))
    depths = metrics['by_depth']
    assert [row['depth'] for row in depths] == [0, 0.5, 1]
    assert [row['accuracy'] for row in depths] == pytest.approx([0, 0, 14 / 15])
    assert [row['keys'] for row in depths] == pytest.approx([0, 0, 2 / 3])
    assert metrics['loss_without'] == 2
    assert metrics['tokens'] == 3 * 3 * LAST
    for name in ('accuracy', 'keys', 'loss'):
        assert metrics[name] == pytest.approx(np.mean([row[name] for row in depths]))


@pytest.mark.slow
def test_its_loss_is_that_of_the_same_targets_in_any_evaluation(evaluator):
    run, batch = evaluator.run, next(evaluator.rows(CASE, 2))
    params = run.init_state().params

    def both(params):
        return *evaluator.outputs(params, batch), run.objective.token_losses(run.model, params, batch)

    nll_BK, right_BK, expected_BN = jax.jit(both)(params)
    np.testing.assert_allclose(nll_BK, expected_BN[:, -LAST:], rtol=1e-5)
    assert right_BK.dtype == bool


@pytest.mark.parametrize(
    ('change', 'fields', 'message'),
    [
        ({'objective': 'mlm'}, {}, 'is for causal language models'),
        ({}, {'depths': 1}, r'evaluators\.passkey\.depths=1: want 2 to 1000'),
    ],
)
def test_refused(change, fields, message):
    run = Run.from_config(resolve(tiny_config(model__num_layers=1, **change)))
    with pytest.raises(UserError, match=message):
        passkey(run, **fields)
