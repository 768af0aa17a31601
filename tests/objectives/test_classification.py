"""Classification: rows, pooling, training from another run, frozen parts, metrics, and what is refused."""

import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics

from gau.data import labelled, passages, tokenizers
from gau.data.documents import Document
from gau.errors import UserError
from gau.experiments.sweep import Program, find_points
from gau.training import evaluate, loop
from gau.training.setup import Run
from tests.conftest import ROOT
from tests.training.tiny import assert_trees_equal, read_metrics, read_state, tiny_config

WORDS = {'colour': 'red green blue', 'number': 'one two three', 'way': 'up down left'}


def write(path, count, *, seed, pairs=False):
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        label = rng.choice(sorted(WORDS))
        line = {'label': label, 'text': ' '.join(rng.choices(WORDS[label].split(), k=rng.randint(2, 12)))}
        if pairs:
            line['text_b'] = 'and so on'
        lines.append(json.dumps(line) + '\n')
    path.write_text(''.join(lines))
    return f'jsonl:{path}'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('classification')
    return {'data__source': write(path / 'train.jsonl', 200, seed=0),
            'data__valid_source': write(path / 'valid.jsonl', 50, seed=1)}  # fmt: skip


def config(data, **fields):
    return tiny_config(
        **{'objective': 'causal_classification', 'data__batch_size': 16, 'steps': 24, 'checkpoint__every_steps': 16}
        | {'eval__every_steps': 12, 'eval__max_tokens': None, 'optimizer__learning_rate': 2e-2, **data, **fields}
    )


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    path = tmp_path_factory.mktemp('trained') / 'run'
    loop.train(config(data), path)
    return path


def test_it_learns_and_is_measured_over_the_whole_split(trained, data):
    rows = read_metrics(trained)
    assert [row['examples'] for row in rows if row['split'] == 'train'] == [16] * 24
    measured = rows[-1]
    assert (measured['split'], measured['examples']) == ('eval/valid', 50)
    assert measured['accuracy'] > 0.6  # by chance a third
    stored = json.loads((trained / 'config.json').read_text())
    assert stored['data']['classification']['labels'] == ['colour', 'number', 'way']
    # The same from the parameters, by scikit-learn, one text after the other.
    run = Run.from_config(loop.resolve(config(data)))
    params, tokenizer = read_state(trained).params, tokenizers.load('bytes')
    apply = jax.jit(lambda tokens_BN, real_BN: run.model.apply({'params': params}, tokens_BN, segment_ids_BN=real_BN))
    right, logits = [], []
    for line in Path(data['data__valid_source'].partition(':')[2]).read_text().splitlines():
        record = json.loads(line)
        ids = [tokenizer.bos_id, *tokenizer.encode(record['text'])[:46], tokenizer.eos_id]
        padded = np.zeros((2, 1, 48), np.int32)
        padded[0, 0, : len(ids)], padded[1, 0, : len(ids)] = ids, 1
        right.append(sorted(WORDS).index(record['label']))
        logits.append(np.asarray(apply(*padded))[0])
    right, logits = np.array(right), np.array(logits)
    predicted = logits.argmax(axis=1)
    assert measured['accuracy'] == pytest.approx(metrics.accuracy_score(right, predicted))
    assert measured['macro_f1'] == pytest.approx(metrics.f1_score(right, predicted, average='macro'))
    assert measured['matthews'] == pytest.approx(metrics.matthews_corrcoef(right, predicted))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, right)
    assert measured['loss'] == pytest.approx(float(nll.mean()), rel=1e-4)


def test_it_resumes_bitwise_and_is_evaluated_from_its_checkpoint(trained, data, tmp_path):
    path = shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(path / 'checkpoints' / '24')
    (path / 'final.json').unlink()
    loop.train(config(data), path)
    assert_trees_equal(read_state(path), read_state(trained))
    assert read_metrics(path) == read_metrics(trained)
    evaluate.evaluate(path, max_tokens=48 * 20)
    assert json.loads((path / 'eval.jsonl').read_text())['examples'] == 20


@pytest.mark.slow
def test_from_a_language_model_with_the_layers_frozen(trained, data, tmp_path):
    fields = {'steps': 6, 'optimizer__learning_rate_rules': ((r'^head/', 10.0),)}
    frozen = config(data, init_from=str(trained), optimizer__frozen=(r'^trunk/',), **fields)
    loop.train(frozen, tmp_path / 'frozen')
    before, after = read_state(trained), read_state(tmp_path / 'frozen')
    assert_trees_equal(after.params['trunk'], before.params['trunk'])
    new = read_state(tmp_path / 'frozen', step=0).params
    assert not np.array_equal(new['head']['kernel'], before.params['head']['kernel'])
    assert not np.array_equal(after.params['head']['kernel'], new['head']['kernel'])
    # Frozen parameters have no moments: what is left are those of the head, and counters.
    assert sum(leaf.size for leaf in jax.tree.leaves(after.opt_state)) < 3 * (32 * 3 + 3)
    for pattern, message in ((r'^body/', 'decides for no parameter'), ('', 'freezes every parameter')):
        with pytest.raises(UserError, match=message):
            loop.train(config(data, optimizer__frozen=(pattern,)), tmp_path / 'none')


def test_the_config_program_takes_the_model_of_a_run(trained, data):
    argument = f'data={data["data__source"]},context=48'
    points = find_points(Program(str(ROOT / 'configs/finetune.py'), argument), f'starts:{trained},seed:2')
    assert [point.name for point in points] == [
        f'run_{start}-seed_{seed}' for start in ('trained', 'drawn') for seed in (0, 1)
    ]
    for point in points:
        assert point.error == ''
        assert point.config.init_from == (str(trained) if 'trained' in point.name else None)
        assert (point.config.model.chunk_size, point.config.model.model_dim) == (16, 32)
    for start in ('/nowhere', str(trained.parent)):
        with pytest.raises(UserError, match='neither a work directory, nor a checkpoint in one, nor an export'):
            Program(str(ROOT / 'configs/finetune.py'), f'start={start}').config({})


@pytest.mark.parametrize('causal', [True, False])
def test_pooling_sees_the_whole_text_and_no_padding(data, causal):
    names = {True: 'causal_classification', False: 'classification'}
    run = Run.from_config(loop.resolve(config(data, objective=names[causal], model__num_layers=1)))
    params, tokens = run.init_params(), jax.random.randint(jax.random.key(1), (2, 48), 0, 256)
    real_BN = jnp.arange(48) < jnp.array([[20], [41]])
    logits = run.model.apply({'params': params}, tokens, segment_ids_BN=real_BN.astype(int))
    hidden = run.model.trunk.apply(
        {'params': params['trunk']}, tokens, segment_ids_BN=real_BN.astype(int), method='hidden'
    )
    pooled = (
        jnp.stack([hidden[0, 19], hidden[1, 40]])
        if causal
        else jnp.stack([hidden[0, :20].mean(axis=0), hidden[1, :41].mean(axis=0)])
    )
    expected = pooled @ params['head']['kernel'] + params['head']['bias']
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    other = jnp.where(real_BN, tokens, 7)
    np.testing.assert_array_equal(
        run.model.apply({'params': params}, other, segment_ids_BN=real_BN.astype(int)), logits
    )


def test_pairs_are_cut_at_the_longer_one():
    first, second = np.arange(10), np.arange(100, 106)
    for room, lengths in ((16, (10, 6)), (15, (9, 6)), (12, (6, 6)), (9, (5, 4)), (2, (1, 1))):
        texts = labelled.cut([first, second], room)
        assert tuple(map(len, texts)) == lengths
        assert (texts[0].tolist(), texts[1].tolist()) == (first[: lengths[0]].tolist(), second[: lengths[1]].tolist())
    assert len(labelled.cut([first], 4)[0]) == 4


def test_a_pair_is_one_row(tmp_path):
    source = write(tmp_path / 'pairs.jsonl', 40, seed=0, pairs=True)
    found = labelled.resolve(config({'data__source': source, 'data__context': 40}).data)
    tokenizer = tokenizers.load('bytes')
    make = labelled.columns(found, tokenizer)
    table = make([Document(text='one', record={'label': 'number', 'text_b': 'up'})])['tokens']
    eos = tokenizer.eos_id
    assert table.tolist() == [[-1, 1, 0], *([x, 1, 0] for x in b'one'), [eos, 1, 0], *([x, 1, 0] for x in b'up'),
                              [eos, 1, 1]]  # fmt: skip
    assert len(make([Document(text='one ' * 50, record={'label': 'number', 'text_b': 'up ' * 50})])['tokens']) == 40
    with pytest.raises(UserError, match=r'the label "colours" is not one of training \(colour, number, way\)'):
        make([Document(text='one', record={'label': 'colours'})])
    with pytest.raises(UserError, match='the field "text_b" is int, not text'):
        make([Document(text='one', record={'label': 'way', 'text_b': 3})])


def test_what_does_not_fit_is_refused_before_anything_is_written(trained, data, tmp_path):
    valid = tmp_path / 'valid.jsonl'
    for line, message in (
        ({'text': 'x', 'label': 'taste'}, r'valid.jsonl:1: the label "taste" is not one of training'),
        ({'text': 'x', 'labels': 'way'}, r'valid.jsonl:1: no field "label" \(data.classification.label_field\)'),
        ({'text': 'x', 'label': 1.5}, 'must be a text or an integer, not 1.5'),
    ):
        valid.write_text(json.dumps(line) + '\n')
        with pytest.raises(UserError, match=message):
            loop.train(config({**data, 'data__valid_source': f'jsonl:{valid}'}), tmp_path / 'run')
    only = tmp_path / 'only.jsonl'
    only.write_text('{"text": "x", "label": "a"}\n' * 40)
    for fields, message in (
        ({'data__source': f'jsonl:{only}'}, 'want two or more, all of them different'),
        ({'data__packing': 'first_fit'}, 'has a row of its own'),
        ({'data__valid_source': f'text:{only}'}, 'a text source has no labels'),
        ({'data__context': 4}, 'must be at least 5'),
        ({'objective': 'lm', 'data__classification__label_field': 'x'}, 'does nothing for the objective lm'),
        (
            {'init_from': str(trained), 'model__model_dim': 64},
            r'does not fit the config: embedding.weight is \[260, 32\]',
        ),
        ({'init_from': str(tmp_path)}, 'is neither a work directory, nor a checkpoint in one, nor an export'),
        ({'init_from': str(trained / 'checkpoints/7')}, r'no such checkpoint, .* has \[16, 24\]'),
    ):
        with pytest.raises(UserError, match=message):
            loop.train(config({**data, **fields}), tmp_path / 'run')
    with pytest.raises(UserError, match='for objectives with classes'):
        loop.train(tiny_config(evaluators={'eval': {'type': 'classification'}}), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_bad_lines_are_left_out_if_that_is_asked_for(tmp_path):
    source = write(tmp_path / 'train.jsonl', 60, seed=0)
    with open(tmp_path / 'train.jsonl', 'a') as file:
        file.write('{"text": "no label"}\n{"text": "x", "label": 3}\n')
    with pytest.raises(UserError, match=r'train.jsonl:61: no field "label"'):
        labelled.resolve(config({'data__source': source, 'data__holdout_every': 0}).data)
    fields = {'data__source': source, 'data__holdout_every': 0, 'data__bad_lines': 'skip'}
    found = labelled.resolve(config(fields).data)
    # Numbers come first, in their order.
    assert found.classification.labels == ('3', 'colour', 'number', 'way')
    assert labelled.count(found, 'train') == 61


def test_labels_of_one_number_stand_in_one_order(tmp_path):
    names = [zeros + str(number) for number in range(8) for zeros in ('0', '')]
    lines = [json.dumps({'text': 'x', 'label': name}) + '\n' for name in names]
    (tmp_path / 'train.jsonl').write_text(''.join(lines))
    fields = {'data__source': f'jsonl:{tmp_path}/train.jsonl', 'data__holdout_every': 0}
    found = labelled.resolve(config(fields).data).classification.labels
    # Between processes, the order in which a set has them differs.
    assert found == tuple(sorted(names, key=lambda name: (int(name), name)))


def test_passages_hold_whole_documents_out(tmp_path):
    rng = random.Random(0)
    lines = []
    for author, books in (('Zoé', 3), ('ZOE', 2), ('Anna', 4), ('Various', 9), ('Tiny', 1)):
        for book in range(books):
            body = ' '.join(f'{author}-{book}-{rng.randint(0, 9)}' for _ in range(40 if author == 'Tiny' else 300))
            lines.append(json.dumps({'author': author, 'text': body}))
    (tmp_path / 'books.jsonl').write_text('\n'.join(lines))
    options = {'source': f'jsonl:{tmp_path}/books.jsonl', 'held_out': None, 'label_field': 'author', 'characters': 100}
    options |= {'left_out': ['various'], 'classes': 2, 'train': 20, 'valid': 10}
    report = passages.write(tmp_path / 'out', **options)
    assert set(report) == {'Anna', 'Zoé'}
    found = {}
    for split, count in (('train', 40), ('valid', 20)):
        examples = [json.loads(line) for line in (tmp_path / 'out' / f'{split}.jsonl').read_text().splitlines()]
        assert len(examples) == count
        found[split] = {word.rpartition('-')[0] for example in examples for word in example['text'].split()}
    assert not found['train'] & found['valid']
    with pytest.raises(UserError, match='exists already'):
        passages.write(tmp_path / 'out', **options)
    with pytest.raises(UserError, match='--left_out: no document has "Variuos" in "author"'):
        passages.write(tmp_path / 'more', **{**options, 'left_out': ['Variuos']})
    with pytest.raises(UserError, match='passages of 100 characters for train, 2000 are asked'):
        passages.write(tmp_path / 'more', **{**options, 'train': 2000})
    with pytest.raises(UserError, match='3 different labels in "author", 5 are asked for'):
        passages.write(tmp_path / 'more', **{**options, 'classes': 5})
