import numpy as np
import pytest

from gau.data import examples, masking, pipeline, tokenizers
from gau.data.documents import Document
from tests.data.conftest import make_config, make_texts, write_jsonl

TEXT = ' '.join(make_texts(20))


def choose(tokens, tokenizer, seed, **fields):
    config = make_config('mlm', **{f'mlm_{name}': value for name, value in fields.items()}).mlm
    return masking.choose(tokens, np.zeros(len(tokens), bool), config, tokenizer, np.random.default_rng(seed))


@pytest.mark.parametrize('kind', ['token', 'whole_word', 'span'])
@pytest.mark.parametrize(('n', 'rate'), [(3, 0.15), (40, 0.15), (1000, 0.15), (200, 0.5), (7, 1.0)])
def test_the_expected_share_is_the_rate(by_bytes, kind, n, rate):
    tokens, begins = by_bytes.encode(TEXT)[:n], np.zeros(n, bool)
    config = make_config('mlm', mlm_masking=kind, mlm_rate=rate).mlm
    shares = [
        masking.choose(tokens, begins, config, by_bytes, np.random.default_rng(seed)).mean() for seed in range(1500)
    ]
    error = 4 * np.std(shares) / np.sqrt(len(shares)) + 1e-12
    assert abs(np.mean(shares) - rate) < error
    assert len(set(np.round(shares, 6))) > 1 or rate == 1.0 or kind == 'token'


def test_whole_words_are_chosen_whole(by_bytes):
    tokens = by_bytes.encode(TEXT)
    chosen = choose(tokens, by_bytes, 0, masking='whole_word')
    words, start = [], 0
    for word in TEXT.split(' '):
        length = len(word.encode()) + (1 if start else 0)
        words.append(chosen[start : start + length])
        start += length
    assert start == len(tokens)
    assert all(word.all() or not word.any() for word in words)
    assert any(len(word) > 1 and word.all() for word in words)


@pytest.mark.parametrize('kind', ['whole_word', 'span'])
def test_words_and_spans_end_with_the_document(by_bytes, kind):
    tokens = by_bytes.encode('ab' * 500)
    config = make_config('mlm', mlm_masking=kind, mlm_rate=0.5).mlm
    begins = np.arange(len(tokens)) % 2 == 0
    chosen = masking.choose(tokens, begins, config, by_bytes, np.random.default_rng(0)).reshape(-1, 2)
    whole = chosen.all(axis=1) | ~chosen.any(axis=1)
    assert whole.all() == (kind == 'whole_word')
    assert 0.4 < chosen.mean() < 0.6


def test_spans_are_longer_than_chance_and_bounded(by_bytes):
    tokens = np.tile(by_bytes.encode('a'), 20_000)

    def runs(**fields):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], choose(tokens, by_bytes, 0, **fields).astype(int), [0]])))
        return edges[1::2] - edges[::2]

    # Spans of at most 10, a few of which touch.
    assert 3 < runs(masking='span').mean() < 6
    assert runs(masking='token').mean() < 1.4
    assert runs(masking='span', span_max=1).mean() < 1.4


def test_what_the_model_sees(by_bytes):
    config = make_config('mlm').mlm
    columns = masking.mlm_columns(config, by_bytes)
    table = np.concatenate(
        [
            columns([Document(text=TEXT), Document(text='short')], np.random.default_rng(seed))['tokens']
            for seed in range(20)
        ]
    )
    inputs, targets, weights = table.T
    chosen = weights == 1
    begins = inputs == examples.BEGIN
    assert (targets[begins] == by_bytes.bos_id).all()
    assert begins.sum() == 40
    inputs = np.where(begins, by_bytes.bos_id, inputs)
    np.testing.assert_array_equal(inputs[~chosen], targets[~chosen])
    assert not np.isin(targets[chosen], [by_bytes.bos_id, by_bytes.eos_id]).any()
    masked = inputs == by_bytes.mask_id
    assert chosen[masked].all()
    assert masked.sum() / chosen.sum() == pytest.approx(0.8, abs=0.03)
    changed = chosen & ~masked & (inputs != targets)
    assert changed.sum() / chosen.sum() == pytest.approx(0.1, abs=0.03)
    assert inputs[changed].max() < 256


def collect(config, steps):
    iterator = pipeline.train_iterator(config, objective='mlm', tokenizer=tokenizers.load('bytes'), seed=3)
    batches = [next(iterator) for _ in range(steps)]
    iterator.close()
    return batches


def test_masks_change_with_the_epoch_and_come_again_with_the_seed(tmp_path):
    # Documents exactly as long as a row, so that rows can be told by their targets.
    texts = [f'{i:02} ' + 'words and ' * 2 + 'more..' for i in range(12)]
    assert {len(text) + 2 for text in texts} == {31}
    path = write_jsonl(tmp_path / 'c.jsonl', [*texts, 'held out'])
    config = make_config('mlm', source=f'jsonl:{path}', packing='document', shuffle='documents')

    def masks(batches):
        found = {}
        for batch in batches:
            for target, weight in zip(batch['targets'], batch['weights'], strict=True):
                found.setdefault(bytes(target[1:3].astype(np.uint8)), []).append(tuple(weight))
        return found

    alone = masks(collect(config, 6))
    assert {len(seen) for seen in alone.values()} == {3}
    assert all(len(set(seen)) > 1 for seen in alone.values())
    assert masks(collect(config, 6)) == alone


def test_evaluation_masks_are_static_and_a_row_may_have_none(tmp_path):
    path = write_jsonl(tmp_path / 'c.jsonl', ['a b', *make_texts(30, longest=4)])
    config = make_config('mlm', source=f'jsonl:{path}', packing='document', holdout_every=2)

    def run():
        return list(
            pipeline.eval_iterator(
                config, split='train', context=32, batch_size=4, objective='mlm', tokenizer=tokenizers.load('bytes')
            )
        )

    first, second = run(), run()
    for left, right in zip(first, second, strict=True):
        assert left.keys() == {'inputs', 'targets', 'weights', 'segment_ids', 'positions'}
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    weights = np.concatenate([batch['weights'] for batch in first])
    assert (weights.sum(axis=1) == 0).any()
    assert (weights.sum(axis=1) > 0).any()
    assert np.isfinite(weights).all()
