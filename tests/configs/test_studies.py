"""Configs that answer one question each: every point of their sweeps is accepted."""

import pytest

from configs import heads
from gau.experiments.sweep import Program, find_points
from tests.conftest import ROOT

SWEEPS = [
    ('relu2', 'models+rate,seed:3', 15),
    ('relu2', 'trials', 16),
    ('relu2', 'mlm', 4),
    ('quality', 'models,seed:5:3', 15),
    ('quality', 'rates+long+memory+base', 16),
    ('quality', 'best+base_best', 6),
    ('quality', 'shifted_forms+exact+softmax+reach', 18),
    ('compression', 'trained+quantised_from_nothing+narrow+teacher+distilled:runs', 6),
    ('compression', 'recovered:runs+quantised:runs', 6),
    ('borders', 'chunks+overlap+far+remedies', 13),
    ('heads', 'heads,seed:2', 10),
    ('recall', 'pairs,models', 21),
    ('recall', 'many', 5),
]


@pytest.mark.parametrize(('study', 'sweep', 'points'), SWEEPS)
def test_every_point_is_accepted(study, sweep, points):
    argument = '' if study == 'recall' else 'data=embedded'
    found = find_points(Program(str(ROOT / 'configs' / f'{study}.py'), argument), sweep)
    assert [point.error for point in found] == [''] * points


def test_the_study_of_borders_has_some_on_a_laptop():
    found = find_points(Program(str(ROOT / 'configs' / 'borders.py'), 'runlocal'), 'chunks+overlap+far+remedies')
    assert [point.error for point in found] == [''] * 13
    assert all(point.config.data.context >= 2 * (point.config.model.chunk_size or 1) for point in found)


def test_what_a_study_sets_can_be_given_instead():
    config = heads.get_config('model=flash,context=256,data=embedded')
    assert (config.model.name, config.data.context) == ('flash', 256)
    assert heads.get_config('data=embedded').data.context == 512


def test_sweeps_on_books_lack_nothing_but_books():
    found = find_points(Program(str(ROOT / 'configs' / 'quality.py'), ''), 'books+far_books')
    assert len(found) == 5
    assert {point.error for point in found} <= {'', f'tokens:{ROOT}/data/books: no such directory'}
