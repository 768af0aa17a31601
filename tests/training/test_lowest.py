"""What a run says of its passes over the text, and of a held-out loss that has risen."""

import math
import shutil
from types import SimpleNamespace

import pytest

from gau.data.passes import Passes
from gau.experiments import page, report
from gau.experiments.report import Options
from gau.training import config as training_config
from gau.training import lowest, start
from gau.training import workdir as files
from tests.experiments.made_up import models


@pytest.mark.parametrize(
    ('step', 'times', 'advice'),
    [
        (6, 0.5, 'more steps no longer help; the checkpoint of step 6 is kept, for --step=6 of eval.py and sample.py'),
        (8, 0.5, 'more steps no longer help; a run with --config.checkpoint.keep_every=8 keeps the best checkpoint'),
        (7, 3.0, 'no longer help; a run with --config.checkpoint.every_steps=7 --config.checkpoint.keep_every=7 keeps'),
    ],
)
def test_the_best_checkpoint_is_named_or_what_would_have_kept_it(step, times, advice):
    risen = lowest.Risen('valid', step, 1.0, 2.0)
    assert advice in lowest.advice(risen, {'tokens:a': Passes(times, 9)}, kept=[6], save_every=4)


def test_only_a_loss_above_the_lowest_by_more_than_chance_has_risen():
    rows = [{'step': 1, 'split': 'train', 'loss': 0.1}, {'step': 1, 'split': 'eval/test', 'loss': None}]
    rows += [{'step': i, 'split': 'eval/valid', 'loss': loss} for i, loss in enumerate((3.0, 2.0, 2.009))]
    rows += [{'step': i, 'split': 'books/valid', 'loss': loss} for i, loss in enumerate((3.0, 2.0, 2.5, math.nan))]
    assert lowest.risen(rows) == [('books/valid', 1, 2.0, 2.5)]
    assert [found.split for found in lowest.risen([*rows, {'step': 3, 'split': 'eval/valid', 'loss': 2.02}])] == [
        'valid',
        'books/valid',
    ]


def test_a_loss_that_is_none_is_not_the_lowest_of_those_to_come():
    before = None
    for step, loss in enumerate((math.nan, 2.0, math.nan, 1.5, 1.5, 3.0)):
        before = lowest.with_loss(before, loss, step)
    assert before == (1.5, 3)


def test_a_fork_counts_what_runs_before_it_have_read_of_the_same_data(tmp_path):
    def steps(name, fork, source):
        config = training_config.default_config()
        config.fork, config.data.source = fork and str(tmp_path / fork[0] / 'checkpoints' / fork[1]), source
        (tmp_path / name).mkdir()
        files.write_json(tmp_path / name / files.CONFIG, files.config_to_dict(config))
        return start.steps_over_data(SimpleNamespace(config=config, total_steps=8))

    assert steps('first', None, 'embedded') == 8
    assert steps('same', ('first', '2'), 'embedded') == 8
    assert steps('other', ('same', '3'), 'text:a') == 5
    # What was read of the other data, before it and in it, and not the steps before that.
    assert steps('like_other', ('other', '6'), 'text:a') == 5
    shutil.rmtree(tmp_path / 'other')
    assert steps('orphan', ('like_other', '7'), 'text:a') is None


def test_a_row_whose_loss_was_lower_before_is_named_below_the_table():
    note = 'The valid loss was lower before the end, by 0.01 nats or more, in '
    for lower, told in ((0.03, f'{note}flash (3.020 at 600 tokens, 3.050 at the end).'), (0.005, None)):
        found = models()
        for run in found[:3]:
            run.curves['valid'][2][2] = run.metrics['valid']['loss'] - lower
        table = page.table(report.make(found, Options()))
        # Notes are wrapped.
        text = ' '.join(table.split())
        assert told in text if told else note not in text
