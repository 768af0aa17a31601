"""Pairs of a source and a target: their rows by hand, and runs that train, resume, are evaluated and refuse."""

import json
import random
import shutil

import numpy as np
import pytest

from gau.data import embedded, pairs, tokenizers
from gau.data.documents import Document
from gau.errors import UserError
from gau.experiments.sweep import Program, find_points
from gau.models.architectures import ARCHITECTURES
from gau.models.families import cross
from gau.objectives import objective as objectives
from gau.training import evaluate, loop
from gau.training.config import resolve
from gau.training.setup import Run
from tests.conftest import ROOT
from tests.programs import call
from tests.training.tiny import assert_trees_equal, read_metrics, read_state, tiny_config

LETTERS = 'abcdefgh'


@pytest.fixture(autouse=True, scope='module')
def registered():
    before = dict(ARCHITECTURES)
    cross.register()
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Documents of one letter, whose title it is three times."""
    path, rng = tmp_path_factory.mktemp('pairs') / 'train.jsonl', random.Random(0)
    lines = []
    for _ in range(400):
        letter = rng.choice(LETTERS)
        title, text = 3 * letter, letter * rng.randint(16, 30)
        lines.append(json.dumps({'title': title, 'text': f'{title}\n\n{text}'}) + '\n')
    path.write_text(''.join(lines))
    return f'jsonl:{path}'


def config(data, **fields):
    own = {'objective': 'titles', 'data__source': data, 'data__context': 32, 'data__batch_size': 16}
    name = fields.pop('name', 'cross_flash')
    if name == 'cross_flash':
        own |= {'model__chunk_size': 8}
    made = tiny_config(**own | {'model__name': name} | fields)
    if name != 'cross_flash':
        made.model.query_key_dim = made.model.chunk_size = None
    return made


def test_halves_leave_nothing_out():
    tokenizer, text = tokenizers.load('bytes'), bytes(range(97, 120)).decode()
    document = Document(text=text)
    found = list(pairs.halves(document, tokenizer, 10))
    assert [(len(source), len(target)) for source, target in found] == [(4, 4), (4, 4), (4, 4)]
    whole = np.concatenate([part for pair in found for part in pair])
    np.testing.assert_array_equal(whole, [*tokenizer.encode(text), tokenizer.eos_id])
    assert [len(target) for _, target in pairs.halves(document, tokenizer, 24)] == [12]
    assert list(pairs.halves(Document(text=''), tokenizer, 10)) == []


def test_a_row_is_a_source_and_a_target_with_padding_after_each(data):
    run = Run.from_config(resolve(config(data, data__batch_size=4)))
    batch = next(run.objective.eval_batches(run.config.data, tokenizer=run.tokenizer, split='valid', context=32,
                                            batch_size=4, max_tokens=None))  # fmt: skip
    tokenizer = run.tokenizer
    for name, (shape, dtype) in run.objective.arrays(run.config.data, rows=4, context=32).items():
        assert (batch[name].shape, batch[name].dtype) == (shape, dtype)
    for row in range(4):
        ids, inputs, targets, weights, positions = (
            batch[name][row] for name in ('segment_ids', 'inputs', 'targets', 'weights', 'positions')
        )
        np.testing.assert_array_equal(ids, [1] * 16 + [2] * 4 + [0] * 12)
        np.testing.assert_array_equal(weights, [0] * 16 + [1] * 4 + [0] * 12)
        np.testing.assert_array_equal(positions, [*range(16), *range(4), *[0] * 12])
        title = tokenizer.encode(tokenizer.decode(targets[16:19]))
        np.testing.assert_array_equal(targets[16:20], [*title, tokenizer.eos_id])
        np.testing.assert_array_equal(inputs[16:20], [tokenizer.bos_id, *title])
        # The text without the title that stood before it, which begins with the same letters here.
        np.testing.assert_array_equal(inputs[:3], title)
        assert (inputs[20:] == tokenizer.pad_id).all()


def test_a_short_source_is_padded_in_the_middle_of_a_row(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"title": "ab", "text": "ab\\n\\nxyz"}\n' * 40)
    made = resolve(config(f'jsonl:{tmp_path}/a.jsonl', data__batch_size=2))
    task = objectives.load('titles')
    batch = next(task.train_batches(made.data, tokenizer=task.tokenizer(made.data), seed=0))
    np.testing.assert_array_equal(batch['segment_ids'][0], [1] * 3 + [0] * 13 + [2] * 3 + [0] * 13)
    assert task.places_per_epoch(made.data, None) == 39 * 32


def test_the_titles_of_the_embedded_corpus_are_its_names():
    made = resolve(config('embedded', data__batch_size=2, data__context=128))
    task = objectives.load('titles')
    tokenizer = task.tokenizer(made.data)
    batch = next(task.train_batches(made.data, tokenizer=tokenizer, seed=0))
    (at,) = np.nonzero(batch['weights'][0])
    name = tokenizer.decode(batch['targets'][0][at[:-1]])
    assert name in dict(embedded.split_text('train'))


def test_an_epoch_of_halves_is_its_passages(tmp_path):
    (tmp_path / 'a.jsonl').write_text(''.join(f'{{"text": "{"x" * n}"}}\n' for n in (0, 5, 31, 32, 200)))
    made = resolve(config(f'jsonl:{tmp_path}/a.jsonl', objective='halves', data__holdout_every=0))
    task = objectives.load('halves')
    assert task.places_per_epoch(made.data, task.tokenizer(made.data)) == (1 + 1 + 2 + 7) * 32


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    path = tmp_path_factory.mktemp('trained') / 'run'
    loop.train(config(data, **LONG), path)
    return path


LONG = {
    'steps': 120,
    'checkpoint__every_steps': 80,
    'eval__every_steps': 60,
    'eval__max_tokens': None,
    'optimizer__learning_rate': 1e-2,
    'optimizer__warmup_steps': 10,
    'optimizer__b2': 0.95,
}


@pytest.mark.slow
def test_it_reads_its_source_resumes_bitwise_and_is_evaluated(trained, data, tmp_path):
    rows = read_metrics(trained)
    first, last = rows[0], rows[-1]
    assert first['loss'] > 4
    assert (last['split'], last['tokens']) == ('eval/valid', 8 * 4)
    assert last['loss'] < 0.1
    # Without the source the first of four tokens is one of eight letters, 2.08 nats.
    blind = loop.train(config(data, name='flash', **LONG), tmp_path / 'blind')
    assert blind['eval']['valid']['loss'] > 0.45
    path = shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(path / 'checkpoints' / '120')
    (path / 'final.json').unlink()
    loop.train(config(data, **LONG), path)
    assert_trees_equal(read_state(path), read_state(trained))
    assert read_metrics(path) == rows
    evaluate.evaluate(path, contexts=[32, 48])
    measured = [json.loads(line) for line in (path / 'eval.jsonl').read_text().splitlines()]
    assert [row['tokens'] for row in measured] == [32, 32]
    for command in (('scripts/sample.py', '--prompt=a'), ('scripts/export.py', f'--output={tmp_path / "out"}')):
        code, _, said = call(*command, f'--workdir={path}')
        assert (code, said.count('\n')) == (2, 1), said


@pytest.mark.slow
def test_it_takes_steps(data, tmp_path):
    """Steps of Transformer++ with a Cross-GAU, in micro-batches; `trained` is more of the same."""
    own = {'name': 'cross_transformer_plus_plus', 'model__cross_unit': 'gau', 'steps': 2, 'objective': 'halves'}
    own |= {'optimizer__warmup_steps': 1, 'optimizer__accumulation_steps': 2, 'eval__max_tokens': 64}
    final = loop.train(config(data, **own), tmp_path / 'run')
    assert np.isfinite(final['eval']['valid']['loss'])
    assert 'decoder/blocks_0/cross/query_key/gamma' in (tmp_path / 'run' / 'parameters.txt').read_text()


@pytest.mark.parametrize(('fields', 'message'), [
    ({'objective': 'lm'}, 'a model with cross-attention needs a source to read'),
    ({'data__source': 'text:a.txt'}, 'a.txt" has no titles, which are a field of jsonl:GLOB'),
    ({'data__packing': 'first_fit'}, 'data.packing=first_fit: pairs fill whole rows'),
    ({'data__attend_across_documents': True}, 'would let a source see the target'),
    ({'data__context': 33}, 'data.context=33 must be an even number from 4 on'),
], ids=str)  # fmt: skip
def test_refused(data, fields, message):
    with pytest.raises(UserError, match=message):
        Run.from_config(resolve(config(data, **fields))).check()


def test_a_document_without_a_title_is_named(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"title": " ", "text": "xyz"}\n' * 40)
    made = resolve(config(f'jsonl:{tmp_path}/a.jsonl', data__batch_size=2))
    task = objectives.load('titles')
    with pytest.raises(UserError, match=r'a.jsonl.*no text in the field "title"'):
        next(task.train_batches(made.data, tokenizer=task.tokenizer(made.data), seed=0))


def test_every_point_of_the_study_is_accepted(data):
    for argument, sweep, points in (('data=embedded', 'heads+controls+softmax,seed:2', 20),
                                    (f'task=titles,data={data}', 'heads+controls', 7),
                                    ('task=titles,runlocal', 'heads+controls', 7)):  # fmt: skip
        found = find_points(Program(str(ROOT / 'configs' / 'cross.py'), argument), sweep)
        assert [point.error for point in found] == [''] * points
