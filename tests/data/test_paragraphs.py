"""gau.data.paragraphs: chunks that end with a paragraph, and the places that they leave empty."""

import itertools

import numpy as np
import pytest

from gau.data import paragraphs, tokenizers
from gau.errors import UserError
from gau.training.config import default_config


def test_places_left_empty_by_hand():
    # Chunks of 3 + 4, of 8, 8 and 4 (one paragraph of 20), and of 1 in the next document.
    found = paragraphs.chunks([np.array([3, 4, 20]), np.array([1])], 8)
    assert found.tokens == pytest.approx(28 / 5)
    assert found.filled == pytest.approx(28 / 40)
    # 7 take 8 places, 8 and 8 as many, 4 take 4, 1 takes 1.
    assert found.filled_by_sizes == pytest.approx(28 / 29)
    assert found.seen == pytest.approx((28 + 36 + 36 + 10 + 1) / 28)


def test_no_choice_of_ends_needs_fewer_chunks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 9, size=8)
        fewest = min(
            1 + sum(cuts)
            for cuts in itertools.product((0, 1), repeat=7)
            if max(part.sum() for part in np.split(lengths, 1 + np.flatnonzero(cuts))) <= 8
        )
        assert lengths.sum() / paragraphs.chunks([lengths], 8).filled / 8 == pytest.approx(fewest)


def test_paragraphs_of_texts(tmp_path):
    texts = tmp_path / 'a.jsonl'
    texts.write_text('{"text": "One. Two!\\nThree\\n\\nFour"}\n')
    config = default_config().data
    config.source, config.holdout_every = f'jsonl:{texts}', 0
    tokenizer = tokenizers.load('bytes')
    lengths = {}
    for ends in paragraphs.ENDS:
        (found,) = paragraphs.survey(config, 'train', tokenizer, ends=ends, at_most=9)
        lengths[ends] = found.tolist()
    assert lengths == {'line': [10, 7, 4], 'blank_line': [17, 4], 'sentence': [5, 5, 7, 4]}
    assert len(paragraphs.table([np.array([10, 7, 4])], [16, 32]).splitlines()) == 4


# Of no document, as of empty ones alone, and of a document without a paragraph.
@pytest.mark.parametrize('documents', [[], [np.array([], np.int64)]], ids=['none', 'empty'])
def test_no_tokens(documents):
    with pytest.raises(UserError, match='no tokens'):
        paragraphs.table(documents, [8])
