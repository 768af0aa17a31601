"""Models that cannot be decoded, each with the reason in one line."""

import pytest

from gau.errors import UserError
from gau.models import decoding
from tests.models import tiny


@pytest.mark.parametrize(
    ('name', 'objective', 'fields', 'capacity', 'message'),
    [
        ('flash', 'mlm', {}, None, 'masked language model cannot be decoded'),
        ('combiner', 'lm', {}, None, 'weighted by the mean of all their queries'),
        ('flash_quad', 'lm', {'normalizer': 'paper'}, 8, 'divides by the length of the whole sequence'),
        ('flash_quad', 'lm', {}, 25, 'relative positions for 24 tokens'),
        ('transformer', 'lm', {}, None, 'transformer keeps the keys and values of all tokens and needs a capacity'),
        ('flash', 'lm', {'far_chunks': 2}, None, 'model.far_chunks=2 keeps the keys and values of all tokens'),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_one_line(name, objective, fields, capacity, message):
    model, _ = tiny.make(name, objective, dtype='float32', **fields)
    with pytest.raises(UserError, match=message):
        decoding.init_state(model, batch_size=1, capacity=capacity)
