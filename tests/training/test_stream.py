"""Reading whole texts with the state carried along, against the loss of the model on each text at once."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from gau.data.tokenizers import load
from gau.errors import UserError
from gau.models.registry import build
from gau.training import stream
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


@pytest.fixture
def evaluator(monkeypatch):
    import jax

    monkeypatch.setattr(stream.sources, 'open_split', lambda config, split: [Documents()])
    config = tiny.tiny_config('flash', context=64, dtype='float32', layer_stack='scan')
    model = build(config, vocab_size=TOKENIZER.vocab_size, causal=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))['params']
    whole = ConfigDict({'model': config, 'data': {}, 'eval': {'max_tokens': None}})
    return stream.StreamEvaluator(whole, model, TOKENIZER, block=16), model, random_like(shapes, 0), whole


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
def test_it_is_the_loss_of_each_text_at_once(evaluator, context):
    evaluate, model, params, _ = evaluator
    pieces = []
    for text in TEXTS:
        frame = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id])
        inputs, targets = frame[:-1], frame[1:]
        size = context or len(inputs)
        pieces += [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(inputs), size)]
    expected = losses(model, params, pieces)
    result = evaluate(params, split='valid', context=context)
    assert result.tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert result.bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.words == sum(len(text.split()) for text in TEXTS)
    np.testing.assert_allclose(result.loss_sum, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(result.position_loss, expected.sum(axis=0), rtol=1e-4)
    assert result.metrics()['bits_per_byte'] == pytest.approx(expected.sum() / math.log(2) / result.bytes, rel=1e-5)


def test_it_stops_at_max_tokens(evaluator):
    evaluate, _, params, config = evaluator
    config.eval.max_tokens = 20
    assert evaluate(params, split='valid').tokens == 20


def test_models_that_keep_every_token_are_refused(evaluator):
    _, _, _, config = evaluator
    model, _ = tiny.make('transformer', dtype='float32')
    with config.unlocked():
        config.model = ConfigDict(model.config)
    with pytest.raises(UserError, match='no state of constant size'):
        stream.StreamEvaluator(config, model, TOKENIZER)
