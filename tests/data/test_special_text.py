"""Text that spells the special tokens of a tokenizer is text: it gives no special id, and no border of a document."""

import json
import pathlib

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from gau.data import examples, manifest, masking, pipeline, prepare, shards, sources, tokenizers
from gau.data.documents import Document
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts

SPECIALS = ('<s>', '</s>', '<pad>', '<mask>')
SPELT = 'was <s>9</s> now <mask> <s>cheap</s> <pad>'
LETTERS = sorted(set(''.join(make_texts(20)) + SPELT))


def unigram():
    """Special tokens that are pieces of the model."""
    pieces = ['<unk>', *SPECIALS, '▁', '▁now', *LETTERS]
    model = hf.Tokenizer(hf.models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    model.pre_tokenizer, model.decoder = hf.pre_tokenizers.Metaspace(), hf.decoders.Metaspace()
    model.add_special_tokens(list(SPECIALS))
    return model


def bpe(*learnt, added=()):
    """Pieces that a BPE has learnt as text, and pieces that were added as text."""
    vocabulary, merges = {letter: i for i, letter in enumerate(LETTERS)}, []
    for piece in (*learnt, '<s>c'):
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocabulary:
                vocabulary[piece[:end]] = len(vocabulary)
                merges.append((piece[: end - 1], piece[end - 1]))
    model = hf.Tokenizer(hf.models.BPE(vocabulary, merges))
    model.decoder = hf.decoders.Fuse()
    model.add_tokens(list(added))
    return model


def bpe_that_learnt_them():
    return bpe(*SPECIALS)


def added_and_not_special():
    return bpe(added=[*SPECIALS, 'now'])


def word_piece():
    model = hf.Tokenizer(hf.models.WordPiece({piece: i for i, piece in enumerate(
        ['[UNK]', '[PAD]', '[CLS]', '[SEP]', '[MASK]', '[', *LETTERS, *(f'##{c}' for c in [*LETTERS, *'[]CLSMASK'])]
    )}, unk_token='[UNK]'))  # fmt: skip
    model.pre_tokenizer, model.decoder = hf.pre_tokenizers.WhitespaceSplit(), hf.decoders.WordPiece(cleanup=False)
    return model


MODELS = (unigram, bpe_that_learnt_them, added_and_not_special, word_piece)


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    """A tokenizer of every kind in which text can spell special tokens, by name."""
    folder = tmp_path_factory.mktemp('spelling')
    found = {}
    for make in MODELS:
        path = folder / f'{make.__name__}.json'
        make().save(str(path))
        found[make.__name__] = tokenizers.load(f'huggingface:{path}')
    for kind in ('unigram', 'bpe'):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*make_texts(30), 'cheap < / > pads'] * 3), model_prefix=str(folder / kind),
            vocab_size=90, model_type=kind, user_defined_symbols=['<mask>', '<s>', 'gate'], pad_id=3, pad_piece='<pad>',
            minloglevel=2, hard_vocab_limit=False, normalization_rule_name='identity', character_coverage=1.0,
        )  # fmt: skip
        found[f'sentencepiece_{kind}'] = tokenizers.load(f'sentencepiece:{folder / kind}.model')
    return found


NAMES = [*(make.__name__ for make in MODELS), 'sentencepiece_unigram', 'sentencepiece_bpe']


def spelt(name):
    if name != 'word_piece':
        return SPELT
    return SPELT.translate({ord('<'): '[', ord('>'): ']'}).replace('mask', 'MASK').replace('s]', 'CLS]')


def specials_of(tokenizer):
    return [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]


@pytest.mark.parametrize('name', NAMES)
def test_text_gives_no_special_id_and_comes_back(loaded, name):
    tokenizer = loaded[name]
    text = spelt(name)
    assert np.isin(tokenizer._encode(text), specials_of(tokenizer)).any(), 'the model itself must fall for it'
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.ordinary[ids].all()
    assert tokenizer.decode(ids) == (text if name != 'word_piece' else ' '.join(text.split()))


@pytest.mark.parametrize('name', NAMES)
def test_other_text_is_encoded_as_ever(loaded, name):
    tokenizer = loaded[name]
    for text in make_texts(20):
        text = text.encode('ascii', errors='ignore').decode()
        ids = tokenizer.encode(text)
        np.testing.assert_array_equal(ids, tokenizer._encode(text))
        # The escaping model differs in the special pieces and nowhere else, so ids keep their meaning.
        np.testing.assert_array_equal(ids, tokenizer._encode_escaped(text))


def test_a_tokenizer_that_text_cannot_fool_is_not_checked(by_bytes, loaded, tmp_path):
    path = tmp_path / 'trained.model'
    tokenizer = tokenizers.load(
        prepare._train_tokenizer(path, [Document(text=text) for text in make_texts(80)], 300, 10**5)
    )
    for safe in (by_bytes, tokenizer):
        assert not safe.spelt_by_text
    assert loaded['unigram'].spelt_by_text


def test_an_unknown_token_that_is_a_special_one_has_no_other_encoding(tmp_path):
    model = hf.Tokenizer(hf.models.WordLevel({'</s>': 0, 'known': 1}, unk_token='</s>'))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / 'words.json'))
    tokenizer = tokenizers.load(f'huggingface:{tmp_path}/words.json')
    assert tokenizer.encode('known').tolist() == [1]
    with pytest.raises(
        UserError, match=r'the text "known foreign" gives the special token "</s>" .* no other encoding'
    ):
        tokenizer.encode('known foreign')


@pytest.mark.parametrize('kind', [hf.models.WordLevel, hf.models.WordPiece])
def test_text_without_a_token_is_named_where_the_model_knows_no_unknown_token(tmp_path, kind):
    model = hf.Tokenizer(kind({'known': 0}, unk_token='[UNK]'))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / 'words.json'))
    (tmp_path / 'a.txt').write_text('known known\nknown foreign\n')
    config = make_config(
        source=f'text:{tmp_path}/a.txt',
        text_unit='line',
        tokenizer=f'huggingface:{tmp_path}/words.json',
        packing='document',
    )
    with pytest.raises(
        UserError, match=r'a.txt:2: the text "known foreign" has what .*words.json" has no token for: .*UNK'
    ):
        list(pipeline.eval_iterator(
            config, split='valid', context=8, batch_size=1, objective='lm', tokenizer=tokenizers.load(config.tokenizer)
        ))  # fmt: skip


def test_a_bpe_that_leaves_characters_out_says_so_once(tmp_path, capsys):
    bpe().save(str(tmp_path / 'bpe.json'))
    tokenizer = tokenizers.load(f'huggingface:{tmp_path}/bpe.json')
    assert tokenizer.decode(tokenizer.encode(SPELT)) == SPELT
    assert capsys.readouterr().err == ''
    for _ in range(2):
        assert tokenizer.decode(tokenizer.encode('was \u2603 <s>')) == 'was  <s>'
    assert capsys.readouterr().err == (
        f'warning: the text "was \u2603 <s>" has what data.tokenizer="{tokenizer.spec}" has no token for: '
        'such characters are left out\n'
    )
    assert np.array_equal(tokenizer.encode('gate'), tokenizer._encode_escaped('gate'))


@pytest.mark.parametrize('name', NAMES)
def test_the_policy_error_names_file_line_text_and_token(loaded, name, tmp_path):
    (tmp_path / 'a.txt').write_text('nothing here\n' + spelt(name) + '\n', encoding='utf-8')
    config = make_config(
        source=f'text:{tmp_path}/a.txt', text_unit='line', tokenizer=loaded[name].spec, special_in_text='error'
    )
    (held,) = sources.open_split(config, 'valid')
    examples.encode(sources.open_split(config, 'train')[0][0], loaded[name])
    with pytest.raises(
        UserError, match=r'a.txt:2: the text ".*as .*9.*" gives the special token "..?.*data.special_in_text="esc'
    ):
        examples.encode(held[0], loaded[name])
    config.special_in_text = 'escape'
    (held,) = sources.open_split(config, 'valid')
    examples.encode(held[0], loaded[name])


def test_other_sources_obey_the_policy_too():
    config = make_config(special_in_text='error')
    documents = sources.open_split(config, 'train')[0]
    assert documents[0].escape is False
    assert documents[-1].place().endswith('.py')
    with pytest.raises(UserError, match=r'data\.special_in_text'):
        make_config(source='embedded', special_in_text='eskape')


@pytest.mark.parametrize(('objective', 'packing'), [('lm', 'concat'), ('lm', 'document'), ('mlm', 'first_fit')])
def test_borders_are_not_found_in_ids(by_bytes, monkeypatch, objective, packing):
    """Whatever the tokens of a document are, the document has one beginning and one end."""
    bos, eos = by_bytes.bos_id, by_bytes.eos_id
    held = [Document(tokens=np.array([65 + i, bos, bos, 66, eos, 67], np.int32)) for i in range(8)]
    monkeypatch.setattr(sources, 'open_split', lambda *_: [held])
    config = (
        make_config(objective, packing=packing, mlm_rate=1e-9) if objective == 'mlm' else make_config(packing=packing)
    )
    frame = {'lm': 7, 'mlm': 8}[objective]
    (batch, *rest) = pipeline.eval_iterator(
        config, split='valid', context=frame * 4, batch_size=8, objective=objective, tokenizer=by_bytes
    )
    assert not rest
    real = batch['segment_ids'] > 0
    assert real.sum() == 8 * frame
    rows = batch['inputs'][real].reshape(8, frame)
    np.testing.assert_array_equal(rows[:, 0], bos)
    np.testing.assert_array_equal(rows[:, 1] - 65, np.arange(8))
    np.testing.assert_array_equal(batch['positions'][real].reshape(8, frame), np.tile(np.arange(frame), (8, 1)))
    targets = batch['targets'][real].reshape(8, frame)
    expected = [[*held[i].tokens.tolist(), eos] for i in range(8)]
    assert targets.tolist() == [([bos] if objective == 'mlm' else []) + tokens for tokens in expected]


def test_masks_are_only_what_was_masked(loaded, tmp_path):
    tokenizer = loaded['sentencepiece_unigram']
    columns = masking.mlm_columns(make_config('mlm').mlm, tokenizer)
    table = columns([Document(text=SPELT * 20)], np.random.default_rng(0))['tokens']
    inputs, targets, chosen = table.T
    assert not (targets == tokenizer.mask_id).any()
    assert chosen[inputs == tokenizer.mask_id].all()


def test_prepared_shards_hold_no_special_id(loaded, tmp_path):
    tokenizer = loaded['unigram']
    (tmp_path / 'a.txt').write_text(f'{SPELT}\n' * 20, encoding='utf-8')
    config = make_config(source=f'text:{tmp_path}/a.txt', text_unit='line', tokenizer=tokenizer.spec)
    prepare.prepare(config, tmp_path / 'out', workers=1)
    prepared = make_config(source=f'tokens:{tmp_path}/out')
    (documents,) = sources.open_split(prepared, 'train')
    assert len(documents) == 19
    assert not any(np.isin(documents[i].tokens, specials_of(tokenizer)).any() for i in range(19))
    # The policy speaks to text; the shards are what they are.
    with pytest.raises(UserError, match=r'data\.special_in_text'):
        make_config(source=f'tokens:{tmp_path}/out', special_in_text='error')


def test_shards_of_earlier_versions_are_looked_at(loaded, tmp_path):
    tokenizer = loaded['unigram']
    written = shards.write(tmp_path / 'x', [([6], 1, 1), ([6, tokenizer.mask_id], 1, 1)], 'uint16')
    size = pathlib.Path(tmp_path / 'x').stat().st_size
    contents = {
        'format': manifest.FORMAT, 'dtype': 'uint16',
        'tokenizer': {'spec': 'bytes', 'fingerprint': tokenizer.fingerprint},
        'splits': {'train': {'shards': [{'file': 'x', 'size': size, 'documents': written['documents']}]}},
        'plan': {'options': {'bad_lines': 'error'}},
    }  # fmt: skip
    (tmp_path / manifest.FILE).write_text(json.dumps(contents))
    documents = shards.Shards(str(tmp_path), 'train', tokenizer)
    assert documents[0].tokens.tolist() == [6]
    with pytest.raises(UserError, match=rf'holds the special id {tokenizer.mask_id}, .*prepare it again'):
        documents[1]
