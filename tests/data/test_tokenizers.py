import pathlib

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from gau.data import embedded, prepare, tokenizers
from gau.data.documents import Texts
from gau.errors import UserError
from tests.data.conftest import make_texts

HOSTILE = [
    '',
    ' ',
    '  two  spaces  ',
    'tabs\tand\nnewlines\n\n\n',
    'CRLF\r\nand a lone \r return',
    'emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽',
    'combining e\u0301 n\u0303 \u0301 z\u0335\u0322\u0321\u0327',
    'control \x01\x02\x07\x08\x1b[31m\x7f \x85 \u2028 \u200b \ufeff',
    'right to left שלום \u202e and back',
    'private \ue000 and astral \U0010ffff',
    'specials spelt out: <s> </s> <pad> <unk> <mask> [MASK] [CLS] <|endoftext|> <0x0A>',
    'ﬁ ﬀ ① ½ ＡＢＣ',
    'x' * 20_000,
    'word ' * 5_000,
]


@pytest.fixture(scope='module')
def specs(tmp_path_factory):
    """One tokenizer of every kind, the models trained here."""
    folder = tmp_path_factory.mktemp('tokenizers')
    texts = [text for _, text in embedded.split_text('valid')[:8]] + make_texts(20)
    sentencepiece = prepare._train_tokenizer(folder / 'tiny.model', Texts(texts), 500, 60_000)
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(folder / 'tiny.json'))
    return {'bytes': 'bytes', 'sentencepiece': sentencepiece, 'huggingface': f'huggingface:{folder / "tiny.json"}'}


KINDS = ('bytes', 'sentencepiece', 'huggingface')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_text_comes_back(specs, kind, text):
    tokenizer = tokenizers.load(specs[kind])
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.ordinary[ids].all(), 'text must not spell special ids'


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=150, deadline=None)
# U+2581 is how SentencePiece writes a space: its own limit.
@given(text=st.text(st.characters(exclude_characters='▁', exclude_categories=['Cs'])))
def test_any_text_comes_back(specs, kind, text):
    tokenizer = tokenizers.load(specs[kind])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize('kind', KINDS)
def test_specials_are_distinct_and_dropped(specs, kind):
    tokenizer = tokenizers.load(specs[kind])
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert len(set(specials)) == 4
    assert max(specials) < tokenizer.vocab_size
    assert not tokenizer.ordinary[specials].any()
    ids = tokenizer.encode('one two')
    assert tokenizer.decode([specials[0], *ids, *specials]) == 'one two'


@pytest.mark.parametrize('kind', KINDS)
def test_lone_surrogates_are_replaced(specs, kind):
    tokenizer = tokenizers.load(specs[kind])
    assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a?b'


@pytest.mark.parametrize('kind', KINDS)
def test_words_begin_where_they_do(specs, kind):
    tokenizer = tokenizers.load(specs[kind])
    ids = tokenizer.encode('the gate unit\nholds')
    begins = tokenizer.starts_word[ids]
    words = np.split(ids, np.flatnonzero(begins[1:]) + 1)
    assert [tokenizer.decode(word).strip() for word in words if tokenizer.decode(word).strip()] == [
        'the',
        'gate',
        'unit',
        'holds',
    ]


def test_appended_specials_enlarge_the_vocabulary(specs):
    tokenizer = tokenizers.load(specs['huggingface'])
    assert tokenizer.eos_id == 0
    assert sorted([tokenizer.bos_id, tokenizer.pad_id, tokenizer.mask_id]) == [330, 331, 332]
    assert tokenizer.vocab_size == 333
    trained = tokenizers.load(specs['sentencepiece'])
    assert (trained.vocab_size, trained.pad_id, trained.bos_id, trained.eos_id) == (500, 0, 2, 3)


def test_invalid_bytes_are_replaced(by_bytes):
    assert by_bytes.decode([0xE2, 0x82, ord('a')]) == '\ufffda'


def test_fingerprints_tell_tokenizers_apart(specs, tmp_path):
    fingerprints = {tokenizers.load(spec).fingerprint for spec in specs.values()}
    assert len(fingerprints) == 3
    copy = tmp_path / 'copy.model'
    copy.write_bytes(pathlib.Path(specs['sentencepiece'].partition(':')[2]).read_bytes())
    assert tokenizers.load(f'sentencepiece:{copy}').fingerprint in fingerprints


def test_broken_files_are_named(tmp_path):
    (tmp_path / 'broken').write_text('{nothing of the kind')
    for kind in ('sentencepiece', 'huggingface'):
        with pytest.raises(UserError, match=f'{kind}:.*cannot read'):
            tokenizers.load(f'{kind}:{tmp_path}/none')
        with pytest.raises(UserError, match=f'{kind}:.*not a'):
            tokenizers.load(f'{kind}:{tmp_path}/broken')
    hf.Tokenizer(hf.models.BPE()).save(str(tmp_path / 'empty.json'))
    with pytest.raises(UserError, match='its vocabulary is empty'):
        tokenizers.load(f'huggingface:{tmp_path}/empty.json')
    with pytest.raises(UserError, match='did you mean "sentencepiece"'):
        tokenizers.load('sentencepeice:x')
