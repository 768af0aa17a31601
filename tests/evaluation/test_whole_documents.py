"""Reading whole documents with the state carried along, against the loss of the model on each document at once."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from gau.data.tokenizers import load
from gau.errors import UserError
from gau.evaluation import whole_documents
from gau.evaluation.evaluator import Case
from gau.evaluation.whole_documents import WholeDocuments
from gau.models.registry import build
from gau.objectives.objective import load as load_objective
from tests.models import tiny
from tests.numerics import random_like

TOKENIZER = load('bytes')
TEXTS = ['é', 'ab cd', 'x' * 61, 'a longer text, of some words and more than a block', 'z'] + ['row after row'] * 9


class Documents:
    def __len__(self):
        return len(TEXTS) + 1

    def __getitem__(self, index):
        from gau.data.documents import Document

        return Document(text=TEXTS[index - 1]) if index else None


def make(model, **entry):
    """The evaluator as the entry `books` of a run of `model`."""
    config = ConfigDict({'model': model.config, 'data': {}, 'eval': {'splits': (), 'max_tokens': None}})
    run = SimpleNamespace(config=config, model=model, tokenizer=TOKENIZER, objective=load_objective('lm'))
    return WholeDocuments(
        run, 'books', ConfigDict({'type': 'whole_documents', 'splits': ('valid',), 'max_tokens': None, **entry})
    )


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(whole_documents.sources, 'open_split', lambda config, split: [Documents()])
    config = tiny.tiny_config('flash', context=64, dtype='float32', layer_stack='scan')
    model = build(config, vocab_size=TOKENIZER.vocab_size, causal=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))['params']
    return model, random_like(shapes, 0)


def losses(model, params, pieces):
    """Nats of each piece, with a model that has forgotten all before it; one padded batch."""
    longest = max(len(inputs) for inputs, _ in pieces)
    table = np.zeros((3, len(pieces), longest), np.int32)
    for row, piece in zip(table.swapaxes(0, 1), pieces, strict=True):
        row[:2, : len(piece[0])], row[2, : len(piece[0])] = piece, 1
    nll = tiny.compile_fast(
        lambda params, tokens, targets, ids: model.apply(
            {'params': params}, tokens, targets, segment_ids_BN=ids, method='token_losses'
        )
    )(params, *table)
    return np.asarray(nll, np.float64) * table[2]


@pytest.mark.parametrize('context', [None, 24])
def test_it_is_the_loss_of_each_document_at_once(model, context):
    model, params = model
    pieces = []
    for text in TEXTS:
        frame = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id])
        inputs, targets = frame[:-1], frame[1:]
        size = context or len(inputs)
        pieces += [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(inputs), size)]
    expected = losses(model, params, pieces)
    evaluator = make(model, block=16)
    case = Case('valid', 'valid', context)
    sums, metrics = evaluator.sums(params, case), dict(evaluator.measure(params, case))
    assert sums.tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert sums.bytes == sum(len(text.encode()) for text in TEXTS)
    assert sums.words == sum(len(text.split()) for text in TEXTS)
    np.testing.assert_allclose(sums.loss, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.by_position[0], expected.sum(axis=0), rtol=1e-4)
    assert metrics['bits_per_byte'] == pytest.approx(expected.sum() / math.log(2) / sums.bytes, rel=1e-5)
    assert metrics['context'] == (context or max(len(text.encode()) for text in TEXTS) + 1)


def test_it_stops_at_max_tokens(model):
    model, params = model
    assert make(model, max_tokens=20).sums(params, Case('valid', 'valid', None)).tokens == 20


def test_models_that_keep_every_token_are_refused():
    model, _ = tiny.make('transformer', dtype='float32')
    with pytest.raises(UserError, match='state of constant size'):
        make(model)


def test_options_that_it_does_not_have_are_refused(model):
    with pytest.raises(UserError, match=r'evaluators.books.blok is unknown .*did you mean "block"'):
        make(model[0], blok=16)
