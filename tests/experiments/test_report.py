"""Tables of made-up runs, whose numbers are known; of real ones: test_acceptance.py."""

import math

import numpy as np
import pytest

from gau.errors import UserError
from gau.experiments import page, publish, report
from gau.experiments.report import Options
from tests.experiments.made_up import made_up, models


def test_rows_are_settings_over_their_seeds():
    made = report.make(models(), Options(against='transformer_plus_plus'))
    assert made.options.by == ('model.name',)
    assert [row.values for row in made.rows] == [{'model.name': 'flash'}, {'model.name': 'transformer_plus_plus'}]
    flash, baseline = made.rows
    assert flash.mean.value == pytest.approx(3.05)
    assert flash.against.difference.value == pytest.approx((-0.2 - 0.18 - 0.21) / 3)
    assert flash.against.p < 0.01
    assert baseline.against is None
    assert made.sigma.degrees == 4


def test_when_a_row_came_to_the_baselines_loss():
    made = report.make(models(), Options(against='transformer_plus_plus'))
    # 0.1967 nats lower at the end, and 0.1 nats a 100 tokens or half a second.
    tokens, seconds = made.rows[0].reached
    assert tokens == pytest.approx(1000 - 100 * 0.59 / 3 / 0.1, abs=0.01)
    assert seconds == pytest.approx(5 - 0.5 * 0.59 / 3 / 0.1, abs=1e-4)
    assert made.rows[1].reached == (1000, 5)
    worse = report.make(models(), Options(against='flash'))
    assert worse.rows[1].reached is None


def test_a_curve_has_the_tokens_at_which_all_seeds_were_evaluated():
    often, seldom = made_up(3.0), made_up(3.1, seed=1)
    seldom.curves['valid'] = [[tokens, tokens / 200, 3.1 + (10 - tokens / 100) / 10] for tokens in (500, 800, 1000)]
    (row,) = report.make([often, seldom], Options()).rows
    np.testing.assert_allclose(report.mean_curve(row, 'valid')[:, :3], [[800, 4, 3.25], [1000, 5, 3.05]])
    assert report.mean_curve(row, 'test').shape == (0, 5)


def test_each_family_has_its_own_baseline():
    names = ('flash', 'flash_quad', 'transformer_plus_plus', 'mc_transformer_plus_plus')
    found = [made_up(3 + place / 10, model__name=name) for place, name in enumerate(names)]
    made = report.make(found, Options(by=('family', 'attention'), against='attention=quadratic'))
    rows = {tuple(row.values.values()): row for row in made.rows}
    assert rows['gated_unit', 'mixed_chunk'].against.difference.value == pytest.approx(-0.1)
    assert rows['transformer', 'mixed_chunk'].against.difference.value == pytest.approx(0.1)
    assert rows['gated_unit', 'quadratic'].against is None
    with pytest.raises(UserError, match='"gone", which is not registered'):
        report.make([made_up(3.0, model__name='gone')], Options(by=('family',)))


@pytest.mark.parametrize('against', ['2', '2.0', '2e0', 'model.expansion_factor=2,model.name=flash'])
def test_a_baseline_is_named_as_the_table_shows_it_or_as_it_was_given(against):
    found = [made_up(3 + factor, model__expansion_factor=factor) for factor in (1.0, 2.0)]
    by = ('model.expansion_factor', 'model.name')
    made = report.make(found, Options(by=by, against=against))
    assert made.baselines == [{'model.expansion_factor': 2.0, 'model.name': 'flash'}]
    assert '| 2 ' in page.table(made)
    for wrong, hint in (('3', 'no row has model.expansion_factor=3; choose from 1, 2'), ('1,model.name=x', '=x; ')):
        with pytest.raises(UserError, match=hint):
            report.make(found, Options(by=by, against=wrong))


def test_two_fields_are_compared_row_by_row():
    found = [
        made_up(loss + seed / 10, seed=seed, model__name=model, data__context=context, tokens=1000)
        for (model, context), loss in {
            ('flash', 512): 3.0,
            ('flash', 1024): 2.9,
            ('performer', 512): 3.5,
            ('performer', 1024): 3.6,
        }.items()
        for seed in (0, 1)
    ]
    made = report.make(found, Options(against='model.name=performer'))
    differences = {tuple(row.values.values()): row.against and row.against.difference.value for row in made.rows}
    assert differences[('flash', 512)] == pytest.approx(-0.5)
    assert differences[('flash', 1024)] == pytest.approx(-0.7)
    assert differences[('performer', 1024)] is None
    assert len(made.baselines) == 2


def test_each_row_takes_its_best_learning_rate():
    found = [
        made_up(loss + seed, seed=seed, model__name=model, optimizer__learning_rate=rate)
        for (model, rate), loss in {
            ('flash', 1e-3): 3.2,
            ('flash', 3e-3): 3.0,
            ('performer', 1e-3): 3.4,
            ('performer', 3e-3): 3.9,
        }.items()
        for seed in (0, 1)
    ]
    made = report.make(found, Options(best='optimizer.learning_rate'))
    assert [tuple(row.values.values()) for row in made.rows] == [('flash', 3e-3), ('performer', 1e-3)]


def test_the_best_accuracy_is_the_largest():
    found = [made_up(1.0, model__chunk_size=size) for size in (1, 2, 3, 4)]
    for run, accuracy in zip(found, (0.5, math.nan, 0.9, 0.7), strict=True):
        run.metrics['valid']['accuracy'] = accuracy
    made = report.make(found, Options(by=('model.name',), best='model.chunk_size', metric='accuracy'))
    assert [row.values['model.chunk_size'] for row in made.rows] == [3]


REFUSED = {
    'no run': ([], Options(), 'no finished run to report'),
    'other data': (models() + models(data='other')[:1], Options(), '--allow=data'),
    'other tokens': (models() + models(tokens=2000)[:1], Options(), '--allow=tokens'),
    'other held-out text': (models() + models(eval_tokens=900)[:1], Options(), '500 and 900 tokens of valid'),
    'unknown allowance': (models(), Options(allow=('tokns',)), 'did you mean "tokens"'),
    'unknown field': (models(), Options(by=('model.nam',)), 'did you mean "model.name"'),
    'unknown row': (models(), Options(against='flsh'), 'did you mean "flash"'),
    'against another field': (models(), Options(against='seed=3'), 'seed is not in --by'),
    'unknown split': (models(), Options(split='vald'), 'did you mean "valid"'),
    'unknown metric': (models(), Options(metric='accuracy'), 'choose from loss, perplexity, tokens'),
    'mixed row': (models(), Options(by=('data.context',)), 'would mix runs that differ in model.name'),
    'a seed twice': (models() + models()[:1], Options(), 'two runs of one setting and seed'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    found, options, hint = REFUSED[name]
    with pytest.raises(UserError, match=hint):
        report.make(found, options)


def test_allowed_when_told():
    mixed = [made_up(3.0 + seed, seed=seed, model__name='performer', tokens=9) for seed in (0, 1)]
    made = report.make(models() + mixed, Options(by=('model.name',), allow=('tokens',)))
    assert len(made.rows) == 3


def test_one_seed_has_no_interval_and_no_p(tmp_path):
    found = [run for run in models() if run.seed == 0]
    made = report.make(found, Options(against='flash'))
    text = publish.write(made, found, tmp_path / 'one')
    assert ' 3.0000 |' in text
    heads = [head.strip() for head in text.splitlines()[0].split('|')[1:-1]]
    assert heads == ['model', 'valid loss', 'difference', 'tokens/s', 'reached', 'time']
    assert 'nothing here says how far chance goes' in text
    assert made.rows[1].against.p is None
    # Beside rows with seeds, their spread says what a single run is worth.
    more = [*models(), made_up(3.5, model__name='performer')]
    made = report.make(more, Options(against='flash'))
    single = next(row for row in made.rows if row.values['model.name'] == 'performer')
    assert single.against.difference.value == pytest.approx(3.5 - made.rows[0].mean.value)
    text = page.table(made)
    assert [line.split()[3] for line in text.splitlines()[:5]] == ['n', '--:', '3', '1', '3']
    assert single.against.difference.format('+') in text
    assert 'share fewer than two seeds' in text
    assert single.holm >= single.against.p
    made = report.make(models(), Options(against='flash'))
    assert 'share fewer than two seeds' not in page.table(made)


def test_two_seeds_are_judged_by_all_rows_of_the_table():
    # Row effects and seed effects that cancel, and what is left over, its sum of squares 0.01 over four degrees.
    left = [(0.05, -0.05), (-0.05, 0.05), (0, 0), (0, 0), (0, 0)]
    found = [
        made_up(3 + size / 100 + seed + rest[seed], seed=seed, model__chunk_size=size)
        for size, rest in enumerate(left, 1)
        for seed in (0, 1)
    ]
    made = report.make(found, Options(against='5'))
    assert made.residual == (pytest.approx(0.05), 4)
    assert made.rows[0].against.difference == (pytest.approx(-0.04), pytest.approx(2.77645 * 0.05, rel=1e-5), 2)
    text = ' '.join(page.table(made).split())
    assert 'share two seeds, interval and p are by the standard deviation that the effects of rows and seeds' in text
    assert '(randomized blocks): 0.0500, 4 degrees of freedom' in text
    # Of four rows too little is known, and of three seeds enough.
    assert 'randomized blocks' not in page.table(report.make(found[:-2], Options(against='4')))
    assert 'randomized blocks' not in page.table(report.make(models(), Options(against='flash')))


def test_what_all_rows_have_in_common_is_said_once():
    found = [
        made_up(3 + size / 100, name=f'pairs_8-{size}', model__chunk_size=size, model__num_layers=2)
        for size in (64, 128)
    ]
    text = page.table(report.make(found, Options(by=('model.name', 'model.chunk_size', 'model.num_layers'))))
    assert [cell.strip() for cell in text.splitlines()[0].split('|')[1:-1]] == ['chunk_size', 'valid loss', 'tokens/s']
    assert text.splitlines()[2].split()[1] == '64'
    for told in ('apart by model.chunk_size.', 'model.num_layers is 2 in all rows.', '(n = 1)', '1.50 M'):
        assert ' '.join(text.split()).count(told) == 1
    # Fields whose last parts are one name have all of it.
    found = [made_up(3 + size, model__size=size, data__size=size + 1) for size in (1, 2)]
    text = page.table(report.make(found, Options(by=('model.size', 'data.size'))))
    assert text.split()[1:4:2] == ['model.size', 'data.size']
    assert 'told apart' not in text
    points = [made_up(3.0, name=name, model__chunk_size=size) for size, name in enumerate(('a-b-c', 'a-b', 'a-bc'))]
    text = page.table(report.make(points, Options(by=('point',))))
    assert [line.split()[1] for line in text.splitlines()[2:5]] == ['b', 'b-c', 'bc']
    assert 'begin with a- as well' in text


def test_parameters_stand_beside_losses_where_they_differ():
    found = models()
    found[0].facts['parameters'] = 1_570_000
    assert 'parameters' not in page.table(report.make(found, Options())).splitlines()[0]
    found[0].facts['parameters'] = 1_580_000
    text = page.table(report.make(found, Options()))
    assert '1.50 M 1.58 M |' in text
    assert text.count('parameters') == 1


def test_a_difference_over_other_seeds_than_its_rows_have_says_how_many():
    found = [
        made_up(loss + seed / 10, seed=seed, model__chunk_size=size)
        for size, (loss, seeds) in {64: (3.0, (0, 1, 2)), 128: (3.2, (1, 2, 3)), 256: (3.4, (0, 1, 2, 3))}.items()
        for seed in seeds
    ]
    text = page.table(report.make(found, Options(against='64')))
    differences = [line.split('|')[4].strip() for line in text.splitlines()[2:5]]
    assert differences[0] == 'baseline'
    assert [float(difference.split()[0]) for difference in differences[1:]] == [0.2, 0.4]
    assert [difference.endswith('(n=2)') for difference in differences] == [False, True, False]
    assert 'n in a difference' in text


def test_notes_are_short_lines_and_passes_are_told_where_one_run_knows_them():
    found = models()
    found[0].facts['passes'] = {'text': '2.8'}
    text = page.table(report.make(found, Options(against='transformer_plus_plus')))
    notes = text.split('\n\n')[1].splitlines()
    assert len(notes) > 3
    assert max(map(len, notes)) <= page.WIDTH
    assert text.count('(2.8 passes over the text)') == 1
