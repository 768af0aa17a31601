"""An objective is one file: a toy one (tests/objectives/toy.py) goes through training, evaluation and checkpoints."""

import json
import shutil

import pytest

from gau.errors import UserError
from gau.objectives.objective import load
from gau.training import evaluate, loop
from tests.training.tiny import assert_trees_equal, read_metrics, read_state, tiny_config

TOY = 'tests.objectives.toy:Halves'


def config(**fields):
    return tiny_config(
        objective=TOY,
        data__batch_size=32,
        steps=30,
        checkpoint__every_steps=20,
        optimizer__learning_rate=1e-2,
        **fields,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('toy') / 'run'
    loop.train(config(), path)
    return path


def test_it_learns_and_is_logged_by_its_own_metrics(trained):
    rows = read_metrics(trained)
    train = [row for row in rows if row['split'] == 'train']
    assert train[0]['sequences'] == 32
    assert 'tokens' not in train[0]
    assert train[-1]['loss'] < 0.5 < train[0]['loss']
    assert 0.8 < train[-1]['accuracy'] <= 1
    evaluated = [row for row in rows if row['split'] == 'eval/valid']
    assert [row['step'] for row in evaluated] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert evaluated[-1]['accuracy'] > 0.8
    assert json.loads((trained / 'final.json').read_text())['eval']['valid']['sequences'] == 128
    assert 'head/kernel' in (trained / 'parameters.txt').read_text()


# test_classification.py resumes a task that is not the default bitwise.
@pytest.mark.slow
def test_it_resumes_bitwise(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(path / 'checkpoints' / '30')
    (path / 'final.json').unlink()
    loop.train(config(), path)
    assert_trees_equal(read_state(path), read_state(trained))
    assert read_metrics(path) == read_metrics(trained)


@pytest.mark.slow
def test_it_is_evaluated_from_its_checkpoint_in_micro_batches_as_well(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / 'run')
    evaluate.evaluate(path)
    assert json.loads((path / 'eval.jsonl').read_text())['accuracy'] == read_metrics(path)[-1]['accuracy']
    with pytest.raises(UserError, match='a loss for each token'):
        evaluate.evaluate(path, evaluators=['perplexity'])
    parts = config(optimizer__accumulation_steps=4)
    parts.steps = 6
    loop.train(parts, tmp_path / 'parts')
    first, whole = read_metrics(tmp_path / 'parts')[0], read_metrics(trained)[0]
    assert first['loss'] == pytest.approx(whole['loss'], rel=1e-5)
    assert first['accuracy'] == pytest.approx(whole['accuracy'])


def test_what_does_not_exist_is_one_line():
    with pytest.raises(UserError, match=r'objective="lmm" is unknown; did you mean "m?lm"'):
        load('lmm')
    with pytest.raises(UserError, match='cannot be imported'):
        load('tests.objectives.toy:Thirds')
