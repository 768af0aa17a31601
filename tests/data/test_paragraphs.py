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


def test_intervals_are_over_documents(tmp_path):
    # Two documents, alike: no interval. Of one document nothing is known.
    alike = [np.array([3, 4, 20]), np.array([3, 4, 20])]
    assert paragraphs.chunks(alike, 8).half == pytest.approx(0, abs=1e-12)
    assert paragraphs.chunks(alike[:1], 8).half is None
    # 7 of 8 places and 8 of 8: residuals 7 - 8 * 15 / 16 = -1/2 and 1/2, so that the error of the share is 1 / 16.
    found = paragraphs.chunks([np.array([7]), np.array([8])], 8)
    assert found.half == pytest.approx(12.706 / 16, rel=1e-4)
    assert '± 79.4%' in paragraphs.table([np.array([7]), np.array([8])], [8])
    paragraphs.plot({'line': alike, 'sentence': alike[:1]}, [8, 16], tmp_path / 'p.png', title='')
    assert (tmp_path / 'p.png').read_bytes()[:4] == b'\x89PNG'
