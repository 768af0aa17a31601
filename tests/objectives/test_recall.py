"""Associative recall: its rows by hand, and a run that trains, resumes where it stood and is evaluated."""

import numpy as np
import pytest

from gau.data import sources
from gau.errors import UserError
from gau.objectives import objective, recall
from gau.training import loop
from gau.training.config import resolve
from tests.programs import call
from tests.training.tiny import tiny_config


def test_a_row_asks_every_key_once_for_its_value():
    row = recall.draw(5, 40, (0, 1, 2))
    keys, values = row['inputs'][:10:2], row['inputs'][1:10:2]
    assert len(set(keys)) == 5
    assert keys.min() > recall.FILLER
    assert keys.max() < recall.VOCABULARY // 2 <= values.min()
    asked = np.flatnonzero(row['weights'])
    assert asked.min() >= 10
    assert sorted(row['inputs'][asked]) == sorted(keys)
    value_of = dict(zip(keys, values, strict=True))
    assert [value_of[key] for key in row['inputs'][asked]] == row['targets'][asked].tolist()
    far = recall.distances(row['inputs'][None], 5)[0]
    for place in range(40):
        at = row['inputs'][place - far[place]] if far[place] else 0
        assert at == row['targets'][place]


def test_rows_are_those_of_the_seed_on_whichever_process():
    config = resolve(tiny_config(objective='recall', data__source='pairs:4')).data
    task = objective.load('recall')
    whole = task.train_batches(config, tokenizer=None, seed=3)
    first, second = next(whole), next(whole)
    part = task.train_batches(config, tokenizer=None, seed=3, rows=[1])
    part.set_state({'batches': 1})
    np.testing.assert_array_equal(next(part)['inputs'], second['inputs'][1:])
    assert (first['inputs'] != second['inputs']).any()


def test_it_trains_and_says_how_much_is_found(tmp_path, capsys):
    config = tiny_config(objective='recall', data__source='pairs:4', steps=2, optimizer__warmup_steps=1)
    config.eval.max_tokens = 20
    final = loop.train(config, tmp_path / 'run')
    assert final['eval']['valid']['queries'] == 20
    assert 0 <= final['eval']['valid']['accuracy'] < 0.5
    assert (tmp_path / 'run' / 'plots' / 'accuracy_by_distance.png').is_file()
    assert 'accuracy' in capsys.readouterr().err
    for command in (('scripts/sample.py', '--prompt=a'), ('scripts/export.py', f'--output={tmp_path / "out"}')):
        code, _, said = call(*command, f'--workdir={tmp_path / "run"}')
        assert (code, 'it has no text' in said) == (2, True)


@pytest.mark.parametrize(
    ('source', 'message'),
    [('embedded', 'want pairs:P'), ('pairs:0', 'want pairs:P'), ('pairs:17', 'at most pairs:16')],
)
def test_refused(source, message):
    with pytest.raises(UserError, match=message):
        resolve(tiny_config(objective='recall', data__source=source))


def test_a_source_of_pairs_holds_no_documents():
    with pytest.raises(UserError, match='its rows are drawn for objective=recall'):
        sources.open_split(resolve(tiny_config(data__source='pairs:4')).data, 'train')
