import collections
import json

import numpy as np
import pytest

from gau.data import pipeline, sources, tokenizers
from gau.data.streams import Streams
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts, write_jsonl

PACKINGS = ('concat', 'first_fit', 'document')


def stream(config, *, objective='lm', seed=0, rows=None, tokenizer=None):
    return pipeline.train_iterator(
        config,
        objective=objective,
        tokenizer=tokenizer or tokenizers.load(config.tokenizer),
        seed=seed,
        rows=rows,
    )


def evaluation(config, split='valid', *, objective='lm', context=32, batch_size=6, **rest):
    return list(
        pipeline.eval_iterator(
            config,
            split=split,
            context=context,
            batch_size=batch_size,
            objective=objective,
            tokenizer=tokenizers.load(config.tokenizer),
            **rest,
        )
    )


def texts_of(config, split):
    (documents,) = sources.open_split(config, split)
    return [documents[i].text for i in range(len(documents))]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)
        assert left[key].dtype == right[key].dtype


@pytest.mark.parametrize('packing', PACKINGS)
def test_every_token_is_a_target_once_after_its_true_predecessor(corpus, by_bytes, packing):
    config = make_config(source=corpus['jsonl'], holdout_every=10, packing=packing)
    batches = evaluation(config)
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    real = joined['weights'] > 0
    np.testing.assert_array_equal(real, joined['segment_ids'] > 0)
    assert (joined['targets'][~real] == by_bytes.pad_id).all()
    documents = {tuple(by_bytes.encode(text).tolist()) for text in texts_of(config, 'valid')}
    # First-fit lays documents out in other rows than they came in; pieces of one document keep their order.
    found, pending = [], {}
    for row in range(len(real)):
        for segment in range(1, joined['segment_ids'][row].max() + 1):
            part = joined['segment_ids'][row] == segment
            inputs, targets = joined['inputs'][row][part], joined['targets'][row][part]
            np.testing.assert_array_equal(joined['positions'][row][part], np.arange(part.sum()))
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            if inputs[0] != by_bytes.bos_id:
                tokens = pending.pop(int(inputs[0]) if packing != 'concat' else None)
                assert tokens[-1] == inputs[0]
            else:
                tokens = []
            tokens = [*tokens, *targets.tolist()]
            if tokens[-1] == by_bytes.eos_id:
                found.append(tuple(tokens[:-1]))
            else:
                pending[tokens[-1] if packing != 'concat' else None] = tokens
    if packing == 'concat':
        assert not pending
    assert collections.Counter(found) == collections.Counter(documents)


@pytest.mark.parametrize('source', ['jsonl', 'tokens'])
@pytest.mark.parametrize('packing', PACKINGS)
def test_sizes_add_up_exactly(corpus, packing, source):
    fields = {'holdout_every': 10} if source == 'jsonl' else {}
    batches = evaluation(make_config(source=corpus[source], packing=packing, **fields))
    texts = texts_of(make_config(source=corpus['jsonl'], holdout_every=10), 'valid')
    assert sum(batch['target_bytes'].sum() for batch in batches) == sum(len(text.encode()) for text in texts)
    assert sum(batch['target_words'].sum() for batch in batches) == sum(len(text.split()) for text in texts)
    for batch in batches:
        assert (batch['target_bytes'][batch['weights'] == 0] == 0).all()


def test_max_tokens_stops_at_whole_rows(corpus):
    config = make_config(source=corpus['jsonl'])
    batches = evaluation(config, 'train', max_tokens=100)
    assert sum(batch['weights'].sum() for batch in batches) == 128


@pytest.mark.parametrize('packing', PACKINGS)
def test_max_tokens_takes_of_every_source_of_a_mixture(tmp_path, by_bytes, packing):
    for name, count in (('a', 60), ('b', 20), ('c', 1)):
        write_jsonl(tmp_path / f'{name}.jsonl', [name * 31] * count)
    mixture = [(1, f'jsonl:{tmp_path}/{name}.jsonl') for name in 'ab']
    # A source may be less than one row of the limit.
    mixture.append((1, f'jsonl:{tmp_path}/c.jsonl'))
    config = make_config(
        source='mixture', mixture=tuple(mixture), packing=packing, valid_source=f'jsonl:{tmp_path}/a.jsonl'
    )
    batches = evaluation(config, 'train', max_tokens=32 * 16)
    rows = collections.Counter(
        by_bytes.decode(targets)[:1]
        for batch in batches
        for targets, weights in zip(batch['targets'], batch['weights'], strict=True)
        if weights.any()
    )
    assert rows == {'a': 12, 'b': 4, 'c': 1}
    assert sum(batch['weights'].sum() for batch in evaluation(config, 'train')) == 81 * 32


@pytest.mark.parametrize(
    ('objective', 'fields'),
    [
        # The next one has its threads, the one after that its window of rows.
        pytest.param('lm', {'packing': 'concat'}, marks=pytest.mark.slow),
        ('lm', {'packing': 'concat', 'shuffle': 'documents', 'read_threads': 3}),
        ('lm', {'packing': 'concat', 'read_threads': 0, 'prefetch_batches': 0, 'attend_across_documents': True}),
        ('lm', {'packing': 'first_fit', 'shuffle': 'none'}),
        ('lm', {'packing': 'document'}),
        pytest.param('mlm', {'packing': 'first_fit'}, marks=pytest.mark.slow),
        pytest.param('mlm', {'packing': 'concat', 'mlm_masking': 'span'}, marks=pytest.mark.slow),
        ('mlm', {'packing': 'document', 'mlm_masking': 'whole_word', 'shuffle': 'documents'}),
    ],
)
def test_resume_is_bitwise_at_every_step_over_an_epoch_border(tmp_path, objective, fields):
    path = write_jsonl(tmp_path / 'c.jsonl', [*make_texts(11, longest=40), ' \n', 'the last one is held out'])
    config = make_config(objective, source=f'jsonl:{path}', holdout_every=13, shuffle_window=None, **fields)
    epoch = pipeline.places_per_epoch(config, tokenizers.load('bytes'), objective)
    steps = 2 * epoch // (config.batch_size * config.context) + 2
    iterator = stream(config, objective=objective)
    states, batches = [iterator.get_state()], []
    for _ in range(steps + 4):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    for k in range(steps):
        resumed = stream(config, objective=objective)
        # Checkpoints hold the state as JSON.
        resumed.set_state(json.loads(json.dumps(states[k])))
        for batch in batches[k : k + 4]:
            assert_same(next(resumed), batch)
        resumed.close()
    # Setting an older state on an iterator that has gone on and prefetched works as well.
    iterator.set_state(states[1])
    assert_same(next(iterator), batches[1])
    iterator.close()


def test_state_does_not_grow_with_the_corpus(tmp_path):
    sizes = []
    for count in (10, 300):
        path = write_jsonl(tmp_path / f'{count}.jsonl', make_texts(count))
        iterator = stream(make_config(source=f'jsonl:{path}'))
        for _ in range(20):
            next(iterator)
        sizes.append(len(json.dumps(iterator.get_state())))
        iterator.close()
    assert max(sizes) < 400


def documents_in(rows, tokenizer, *, carry=None):
    """Yields the targets of each document as it ends in a stream of concatenated rows."""
    pending = carry if carry is not None else []
    for inputs, targets in rows:
        for before, token in zip(inputs.tolist(), targets.tolist(), strict=True):
            if before == tokenizer.bos_id:
                assert not pending
            pending.append(token)
            if token == tokenizer.eos_id:
                yield tuple(pending)
                pending.clear()


@pytest.mark.parametrize('count', [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_an_epoch_over_shards_covers_every_token_once(corpus, by_bytes, count):
    config = make_config(source=corpus['tokens'], shuffle='documents', streams=count)
    (documents,) = sources.open_split(config, 'train')
    expected = collections.Counter((*documents[i].tokens.tolist(), by_bytes.eos_id) for i in range(len(documents)))
    epochs = [collections.Counter(), collections.Counter()]
    for index in range(count):
        share = len(range(index, len(documents), count))
        own = range(index * 6 // count, (index + 1) * 6 // count)
        iterator = stream(config, rows=own)

        def rows(iterator=iterator, own=own):
            for step in range(10_000):
                if step % 5 == 3:
                    state = json.loads(json.dumps(iterator.get_state()))
                    iterator.close()
                    iterator = stream(config, rows=own)
                    iterator.set_state(state)
                batch = next(iterator)
                assert batch['inputs'].shape == (6 // count, 32)
                assert (batch['weights'] == 1).all()
                yield from zip(batch['inputs'], batch['targets'], strict=True)

        seen = documents_in(rows(), by_bytes)
        for epoch in epochs:
            for _ in range(share):
                epoch[next(seen)] += 1
    assert epochs[0] == expected
    assert epochs[1] == expected
    assert pipeline.places_per_epoch(config, by_bytes) == sum(len(tokens) * n for tokens, n in expected.items())


# Two streams, each of several rows: of 'concat' alone is quick, as the packing is a stream's own.
@pytest.mark.parametrize(('packing', 'streams'), [
    *((packing, streams) for packing in PACKINGS for streams in (1, 6)), ('concat', 2),
    *(pytest.param(packing, 2, marks=pytest.mark.slow) for packing in PACKINGS if packing != 'concat'),
])  # fmt: skip
def test_the_order_does_not_depend_on_who_reads_which_rows_nor_does_the_state(corpus, packing, streams):
    config = make_config(source=corpus['jsonl'], packing=packing, streams=streams)
    alone = stream(config)
    whole = [next(alone) for _ in range(9)]
    # Before the fifth batch, other processes take over, of which some share a stream and one holds scattered rows.
    first, second = [(0, 1, 2), (3, 4, 5)], [(0, 1), (2, 5), (3, 4)]
    state = {}
    for iterators, steps in ((first, range(4)), (second, range(4, 9))):
        iterators = {rows: stream(config, rows=rows) for rows in iterators}
        for iterator in iterators.values():
            if state:
                iterator.set_state(json.loads(json.dumps(state)))
        for step in steps:
            for rows, iterator in iterators.items():
                assert_same(next(iterator), {key: x[list(rows)] for key, x in whole[step].items()})
        for iterator in iterators.values():
            state |= iterator.get_state()
            iterator.close()
    assert state == alone.get_state()
    alone.close()


def test_short_documents_go_in_groups_once_an_epoch_and_resume(tmp_path, by_bytes):
    texts = make_texts(200, longest=6)
    path = write_jsonl(tmp_path / 'c.jsonl', [*texts[:50], ' ', *texts[50:]])
    config = make_config(source=f'jsonl:{path}', valid_source=f'jsonl:{path}', shuffle='documents')

    def rows():
        iterator = stream(config)
        while True:
            state = json.loads(json.dumps(iterator.get_state()))
            batch, again = next(iterator), stream(config)
            again.set_state(state)
            assert_same(next(again), batch)
            again.close()
            yield from zip(batch['inputs'], batch['targets'], strict=True)

    seen = documents_in(rows(), by_bytes)
    epochs = [sorted(by_bytes.decode(next(seen)) for _ in texts) for _ in range(2)]
    assert epochs == [sorted(texts)] * 2


def test_epochs_and_seeds_differ_in_order_and_shuffle_none_does_not(corpus, by_bytes):
    def order(config, seed, epochs=2):
        iterator = stream(config, seed=seed)
        rows = (
            row
            for _ in range(10_000)
            for batch in [next(iterator)]
            for row in zip(batch['inputs'], batch['targets'], strict=True)
        )
        seen = documents_in(rows, by_bytes)
        return [[next(seen) for _ in range(36)] for _ in range(epochs)]

    shuffled = make_config(source=corpus['tokens'], shuffle='documents')
    first, second = order(shuffled, 0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert order(shuffled, 0) == [first, second]
    assert order(shuffled, 1)[0] not in (first, second)
    first, second = order(make_config(source=corpus['tokens'], shuffle='none'), 0)
    assert first == second


def test_unshuffled_first_fit_keeps_the_order(corpus, by_bytes):
    config = make_config(source=corpus['tokens'], shuffle='none', packing='first_fit', context=600)
    first = by_bytes.decode(next(stream(config))['targets'][0])
    assert first.startswith(corpus['texts'][0] + corpus['texts'][1])


def test_the_window_only_reorders_rows(corpus):
    plain = stream(make_config(source=corpus['tokens'], shuffle='documents'))
    mixed = stream(make_config(source=corpus['tokens'], shuffle='rows', shuffle_window=32 * 12))
    rows = [[tuple(row) for _ in range(4) for row in next(iterator)['targets'].tolist()] for iterator in (plain, mixed)]
    assert rows[0] != rows[1]
    assert sorted(rows[0][:12]) == sorted(rows[1][:12])
    assert sorted(rows[0][12:]) == sorted(rows[1][12:])


def test_prepared_tokens_give_the_same_batches_as_the_text(corpus):
    from_text = stream(make_config(source=corpus['jsonl'], holdout_every=10))
    from_tokens = stream(make_config(source=corpus['tokens']))
    for _ in range(8):
        assert_same(next(from_text), next(from_tokens))


def test_attention_across_documents(corpus):
    batch = next(stream(make_config(source=corpus['tokens'], attend_across_documents=True)))
    assert batch.keys() == {'inputs', 'targets', 'weights'}
    padded = next(stream(make_config(source=corpus['tokens'], attend_across_documents=True, packing='first_fit')))
    real = padded['weights'] > 0
    assert set(np.unique(padded['segment_ids'])) <= {0, 1}
    np.testing.assert_array_equal(padded['positions'], np.where(real, np.arange(32), 0))
    # A bidirectional model would see the padding at the end of the evaluation.
    last = evaluation(
        make_config('mlm', source=corpus['tokens'], packing='concat', attend_across_documents=True), objective='mlm'
    )[-1]
    assert (last['segment_ids'] == 0).any()


def test_mixture_holds_its_shares_and_never_mixes_in_a_row(tmp_path, by_bytes):
    for name in 'ab':
        write_jsonl(tmp_path / f'{name}.jsonl', [name * (30 + 7 * i) for i in range(30)])
    mixture = ((3, f'jsonl:{tmp_path}/a.jsonl'), (1, f'jsonl:{tmp_path}/b.jsonl'))
    config = make_config(source='mixture', mixture=mixture)
    iterator = stream(config)
    counts = collections.Counter()
    for _ in range(40):
        for row in next(iterator)['targets']:
            (letter,) = set(by_bytes.decode(row))
            counts[letter] += 1
    assert counts['a'] == pytest.approx(3 * counts['b'], rel=0.05)
    resumed = stream(config)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    for _ in range(5):
        assert_same(next(resumed), next(iterator))
    assert len(evaluation(config)) >= 1
    total = sum(
        len(text.encode()) + 1
        for documents in sources.open_split(config, 'train')
        for text in [documents[i].text for i in range(len(documents))]
    )
    assert pipeline.places_per_epoch(config, by_bytes) == total


def test_a_stream_without_any_text_is_said():
    class Ended:
        def __next__(self):
            raise StopIteration

        def get_state(self):
            return {}

    streams = Streams({1: Ended()}, rows=(1,), batch_size=2, streams=2)
    with pytest.raises(UserError, match=r'data\.streams=2: all documents of stream 1 are blank'):
        next(streams)


def test_what_cannot_be_fed_is_said(corpus, tmp_path):
    tiny = write_jsonl(tmp_path / 'tiny.jsonl', ['a few words', 'and a few more', 'end'])
    with pytest.raises(UserError, match=r'less than one batch of data.batch_size=6 rows of data.context=32'):
        stream(make_config(source=f'jsonl:{tiny}'))
    with pytest.raises(UserError, match=r'batch_size=6 must be a multiple of data.streams=4'):
        make_config(source=corpus['jsonl'], streams=4)
    with pytest.raises(UserError, match='no split "vaild"; did you mean "valid"'):
        evaluation(make_config(source=corpus['jsonl']), 'vaild')
    few = write_jsonl(tmp_path / 'few.jsonl', ['long enough text ' * 50, 'held out'])
    with pytest.raises(UserError, match=r'1 documents for data.streams=2'):
        stream(make_config(source=f'jsonl:{few}', streams=2))


@pytest.mark.parametrize(('source', 'objective'), [
    ('tokens', 'lm'), pytest.param('jsonl', 'mlm', marks=pytest.mark.slow),
    pytest.param('jsonl', 'lm', marks=pytest.mark.slow), pytest.param('tokens', 'mlm', marks=pytest.mark.slow),
])  # fmt: skip
def test_the_places_of_an_epoch_hold_its_padding_too(corpus, by_bytes, source, objective):
    fields = {'holdout_every': 10} if source == 'jsonl' else {}
    texts = texts_of(make_config(source=corpus['jsonl'], holdout_every=10), 'train')
    lengths = [len(text.encode()) + {'lm': 1, 'mlm': 2}[objective] for text in texts]
    for packing, n in (('concat', 32), ('document', 32), ('document', 512), ('first_fit', 32), ('first_fit', 512)):
        config = make_config(
            objective, source=corpus[source], packing=packing, context=n, shuffle='documents', **fields
        )
        # What is counted does not depend on it; a batch costs more than its rows.
        config.batch_size = 6 * 512 // n
        found = pipeline.places_per_epoch(config, by_bytes, objective)
        if packing == 'concat':
            assert found == sum(lengths)
        elif packing == 'document':
            assert found == sum(-(-length // n) * n for length in lengths)
        else:
            # Of what training really feeds: EOS once a document, over some epochs.
            iterator, ended, rows = stream(config, objective=objective), 0, 0
            while rows * n < 64_000:
                batch = next(iterator)
                rows += len(batch['targets'])
                ended += (batch['targets'] == by_bytes.eos_id).sum()
            iterator.close()
            assert found > sum(lengths)
            assert ended / len(texts) == pytest.approx(rows * n / found, rel=0.04)
