"""What a run says of its passes over the text, and of a held-out loss that has risen."""

import math
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from gau.data.passes import Passes
from gau.experiments import page, report
from gau.experiments.report import Options
from gau.training import loop, lowest, start
from tests.experiments.test_report import models


@pytest.mark.parametrize(
    ('step', 'times', 'advice'),
    [
        (6, 0.5, 'more steps no longer help; the checkpoint of step 6 is kept, for --step=6 of eval.py and sample.py'),
        (8, 0.5, 'more steps no longer help; a run with --config.checkpoint.keep_every=8 keeps the best checkpoint'),
        (7, 3.0, 'no longer help; a run with --config.checkpoint.every_steps=7 --config.checkpoint.keep_every=7 keeps'),
    ],
)
def test_the_best_checkpoint_is_named_or_what_would_have_kept_it(step, times, advice):
    stub = SimpleNamespace(saved=SimpleNamespace(steps=lambda: [6]), run=SimpleNamespace(save_every=4))
    risen = lowest.Risen('valid', step, 1.0, 2.0)
    assert advice in loop._Loop._advice(stub, risen, {'tokens:a': Passes(times, 9)})


def test_only_a_loss_above_the_lowest_by_more_than_chance_has_risen():
    rows = [{'step': 1, 'split': 'train', 'loss': 0.1}, {'step': 1, 'split': 'eval/test', 'loss': None}]
    rows += [{'step': i, 'split': 'eval/valid', 'loss': loss} for i, loss in enumerate((3.0, 2.0, 2.009))]
    rows += [{'step': i, 'split': 'books/valid', 'loss': loss} for i, loss in enumerate((3.0, 2.0, 2.5, math.nan))]
    assert lowest.risen(rows) == [('books/valid', 1, 2.0, 2.5)]
    assert [found.split for found in lowest.risen([*rows, {'step': 3, 'split': 'eval/valid', 'loss': 2.02}])] == [
        'valid',
        'books/valid',
    ]


def test_a_fork_counts_what_its_parent_has_read_of_the_same_data(tmp_path, monkeypatch):
    (tmp_path / 'config.json').touch()
    config = ConfigDict({'fork': str(tmp_path / 'checkpoints' / '6')})
    run = SimpleNamespace(config=config, total_steps=8, passes=lambda steps: steps)
    for same, steps in ((True, 8), (False, 2)):
        monkeypatch.setattr(start, '_goes_on_in_data', lambda run, parent, same=same: same)
        assert start.passes(run) == steps
    config.fork = str(tmp_path / 'gone' / 'checkpoints' / '6')
    assert start.passes(run) == {}


def test_a_row_whose_loss_was_lower_before_is_named_below_the_table():
    note = 'The valid loss was lower before the end, by 0.01 nats or more, in '
    for lower, told in ((0.03, f'{note}flash (3.020 at 600 tokens, 3.050 at the end).'), (0.005, None)):
        found = models()
        for run in found[:3]:
            run.curves['valid'][2][2] = run.metrics['valid']['loss'] - lower
        text = page.table(report.make(found, Options()))
        assert told in text if told else note not in text
