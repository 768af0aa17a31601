"""Sources of their own for the held-out splits."""

import pytest

from gau.data import prepare, sources, tokenizers
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts, write_jsonl

TEXTS = make_texts(12, seed=7)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Directories of prepared tokens: one with a split `valid`, one of training documents alone."""
    folder = tmp_path_factory.mktemp('prepared')
    path = write_jsonl(folder / 'a.jsonl', TEXTS)
    for name, every in (('split', 4), ('whole', 0)):
        prepare.prepare(make_config(source=f'jsonl:{path}', holdout_every=every), folder / name, workers=1)
    return folder


def texts_of(config, split):
    found = []
    for documents in sources.open_split(config, split):
        for i in range(len(documents)):
            document = documents[i]
            found.append(document.text or tokenizers.load('bytes').decode(document.tokens))
    return found


def test_nothing_need_be_held_out(prepared):
    config = make_config(source=f'jsonl:{prepared}/a.jsonl', holdout_every=0)
    for source in (config, make_config(source=f'tokens:{prepared}/whole')):
        assert sources.splits(source) == ['train']
        assert texts_of(source, 'train') == TEXTS
    with pytest.raises(UserError, match='no split "valid"'):
        sources.open_split(config, 'valid')


@pytest.mark.parametrize('source', ['tokens', 'jsonl'])
def test_prepared_tokens_may_be_held_out(prepared, corpus, source):
    alone = make_config(source=corpus[source])
    for field, split in (('valid_source', 'valid'), ('test_source', 'test')):
        config = make_config(source=corpus[source], **{field: f'tokens:{prepared}/whole'})
        assert sources.splits(config) == ['train', 'valid', 'test'][: 2 if split == 'valid' else 3]
        assert texts_of(config, split) == TEXTS
        if split == 'test' or source == 'tokens':
            assert texts_of(config, 'train') == texts_of(alone, 'train')
    # Of its splits the one of that name counts.
    config = make_config(source=corpus[source], valid_source=f'tokens:{prepared}/split')
    assert texts_of(config, 'valid') == TEXTS[3::4]
    assert config.valid_source in sources.identity(config)


def test_text_may_be_held_out_beside_prepared_tokens(prepared, corpus):
    config = make_config(source=corpus['tokens'], valid_source=f'jsonl:{prepared}/a.jsonl', text_field='text')
    assert texts_of(config, 'valid') == TEXTS


def test_a_mixture_keeps_what_prepared_tokens_hold_out(prepared, corpus):
    mixture = ((1, corpus['tokens']), (1, corpus['jsonl']))
    config = make_config(source='mixture', mixture=mixture, valid_source=f'tokens:{prepared}/whole')
    assert texts_of(config, 'valid') == [*texts_of(make_config(source=corpus['tokens']), 'valid'), *TEXTS]
    # Unless all of it is prepared.
    mixture = ((1, corpus['tokens']), (1, f'tokens:{prepared}/split'))
    config = make_config(source='mixture', mixture=mixture, valid_source=f'tokens:{prepared}/whole')
    assert texts_of(config, 'valid') == TEXTS


def test_other_tokenizers_are_refused(prepared, corpus, tmp_path):
    path = prepare._train_tokenizer(tmp_path / 'm.model', sources.open_split(make_config(), 'valid')[0], 400, 60_000)
    config = make_config(source=corpus['jsonl'], tokenizer=path, valid_source=f'tokens:{prepared}/whole')
    with pytest.raises(UserError, match=r'whole was prepared with the tokenizer bytes .*: prepare the text again'):
        sources.open_split(config, 'valid')
