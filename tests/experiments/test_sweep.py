import json
import sys

import pytest

from gau.data import manifest
from gau.errors import UserError
from gau.experiments import plan
from gau.experiments.kept import Missing
from gau.experiments.sweep import Program, find_points
from gau.training import workdir
from gau.training.config import flatten
from tests.conftest import ROOT

PATH = str(ROOT / 'tests' / 'experiments' / 'program.py')
PROGRAM = Program(PATH)


def names(expression, program=PROGRAM):
    return [point.name for point in find_points(program, expression)]


def test_product_and_union_and_their_order():
    assert names('chunk_size,seed:2') == [f'chunk_size_{c}-seed_{s}' for c in (16, 32) for s in (0, 1)]
    assert names('rate:1e-3+expansion,seed:1') == [
        'learning_rate_0.001-seed_0',
        'expansion_factor_1-seed_0',
        'expansion_factor_2-seed_0',
    ]
    assert names('seed:2:3') == ['seed_3', 'seed_4']
    assert names('optimizer.learning_rate:1e-3:3e-3') == ['learning_rate_0.001', 'learning_rate_0.003']
    assert names(':context:32:64') == ['context_32', 'context_64']


def test_points_are_resolved_with_all_that_they_set():
    first, *_, last = find_points(PROGRAM, 'chunk_size,expansion,seed:2')
    assert (first.config.model.chunk_size, first.config.model.expansion_factor, first.config.seed) == (16, 1.0, 0)
    assert (last.config.model.chunk_size, last.config.model.expansion_factor, last.config.seed) == (32, 2.0, 1)
    program = Program(PATH, 'context=32', {'steps': 7})
    (point, _) = find_points(program, 'chunk_size')
    assert (point.config.data.context, point.config.steps) == (32, 7)
    (argument, _) = find_points(PROGRAM, 'long')
    assert argument.config.data.context == 512
    assert [point.config.data.context for point in find_points(PROGRAM, ':context:32:128')] == [32, 128]


def test_a_duration_in_another_unit_takes_the_place_of_the_first():
    (point,) = find_points(PROGRAM, 'tokens:1280')
    assert (point.config.tokens, point.config.steps) == (1280, None)


def test_the_command_line_of_a_point_gives_the_same_config(monkeypatch):
    from absl import flags
    from ml_collections import config_flags

    from gau import cli

    program = Program(PATH, 'steps=9', {'optimizer.weight_decay_rules': (('kernel', 0.5),), 'data.tokenizer': 'bytes'})
    for point in find_points(program, 'long+rate:1e-05,seed:2'):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file('config', None, '', lock_config=True, flag_values=values)
        # The flags of the fields are made from the command line of the process.
        monkeypatch.setattr(sys, 'argv', ['train.py', *program.arguments(point.overrides)])
        values(sys.argv)
        monkeypatch.setattr(flags, 'FLAGS', values)
        assert workdir.config_to_dict(cli.load_config()) == workdir.config_to_dict(point.config)


def test_confounds_are_shown():
    text = plan.describe(PROGRAM, find_points(PROGRAM, 'long'))
    assert 'model.chunk_size: 16 -> 1024' in text
    assert 'with it' in text
    assert 'model.relative_bias: toeplitz -> rotary' in text


def test_what_seeds_share_is_said_once_in_lines_that_fit_a_terminal():
    lines = plan.describe(PROGRAM, find_points(PROGRAM, 'seed:2,long+heads')).splitlines()
    assert max(map(len, lines)) <= 100
    text = ' '.join(line.strip() for line in lines)
    assert '0  seed_0-table  :context=512, model.chunk_size: 16 -> 512; with it data.context: 64 -> 512,' in text
    assert '6  seed_1-num_heads_1  as point 2, another seed 7  seed_1-num_heads_5  REFUSED as point 3' in text
    # Some fields have a value `none`: what a model has not is not said to be None.
    assert 'model.relative_bias_length: 16 -> unset' in text


def test_refused_points_are_shown_with_the_reason_and_keep_their_number():
    points = find_points(PROGRAM, 'heads+rate:1e-3:2e-3')
    assert points[1].config is None
    text = plan.describe(PROGRAM, points)
    assert '  1  num_heads_5  REFUSED: model.num_heads=5, which does not divide' in text
    table = plan.costs(points, chip='H100', utilisation=0.4)
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == ['0', '2', '3']


def test_costs_are_those_of_the_closed_form():
    (point,) = find_points(PROGRAM, 'rate:1e-3')
    table = plan.costs([point], chip='v4', utilisation=0.5)
    from gau.models import counts

    flops = counts.flops_per_token(point.config.model, context=64, vocab_size=260, causal=True)
    tokens = 12 * 2 * 64
    assert f'{tokens:,}' in table
    assert f'{3 * flops * tokens:.3g}' in table
    assert 'TPU v4' in table
    with pytest.raises(UserError, match='did you mean "H100"'):
        plan.costs([point], chip='H1000', utilisation=0.5)


def test_passes_stand_beside_the_tokens_where_the_data_are_prepared(tmp_path):
    contents = {'format': manifest.FORMAT, 'tokenizer': {'spec': 'bytes'}}
    contents['splits'] = {'train': {'documents': 68, 'tokens': 12 * 2 * 64 // 4 - 68}}
    (tmp_path / manifest.FILE).write_text(json.dumps(contents))
    points = find_points(Program(PATH, '', {'data.source': f'tokens:{tmp_path}'}), 'rate:1e-3+expansion')
    head, *rows, _ = plan.costs(points, chip='H100', utilisation=0.5).splitlines()
    assert head.split() == ['point', 'parameters', 'steps', 'tokens', 'passes', 'FLOPs', 'hours']
    assert [row.split()[5] for row in rows] == ['4'] * 3
    assert max(map(len, [head, *rows])) <= 100
    missing = plan.missing({'t': points}, [Missing(points[0], ['t'])], chip='H100', utilisation=0.5)
    assert missing.splitlines()[1].split()[2:6] == ['0', '12', '1,536', '4']
    assert 'passes' not in plan.costs(find_points(PROGRAM, 'rate:1e-3'), chip='H100', utilisation=0.5)


BAD = {
    'chunk_sise': 'no sweep "chunk_sise"; did you mean "chunk_size"',
    'model.chunk_sise:3': 'did you mean "model.chunk_size"',
    'model.chunk_size': 'values of model.chunk_size are missing',
    'gate:none': 'no sweep "gate"; did you mean "model.gate"',
    'zzz.yyy:1': 'the nearest are',
    ':context': 'values of :context are missing: :context:VALUE',
    ':context:32,:context:64': ':context is set twice',
    '::': 'no sweep ""',
    'seed,seed': 'seed is set twice',
    'chunk_size+chunk_size': 'point chunk_size_16 is given twice',
    'chunk_size+seed:1': 'points chunk_size_16 and seed_0 are one and the same run',
    'seed:1:2:3': 'seed:1:2:3 is not what "seed" of',
    'seed:many': 'want whole numbers',
    'seed:2:1.5': 'want whole numbers',
    'not_dicts': 'yields 3, not a dict',
    'returns': 'returns 3 and yields nothing',
    'nameless': 'the name of a point has no letter',
    'open': 'sets model.gate=None',
    '': 'no sweep ""',
}


@pytest.mark.parametrize('expression', BAD)
def test_bad_sweeps_are_user_errors(expression):
    with pytest.raises(UserError, match=BAD[expression].replace('(', r'\(')):
        find_points(PROGRAM, expression)


def test_a_field_that_does_not_exist_refuses_its_point():
    (point,) = find_points(PROGRAM, 'unknown')
    assert 'did you mean "chunk_size"' in point.error


def test_the_command_line_and_a_sweep_do_not_set_the_same_field():
    with pytest.raises(UserError, match=r'model\.chunk_size is set twice'):
        find_points(Program(PATH, '', {'model.chunk_size': 8}), 'chunk_size')


def test_long_names_are_cut_and_stay_distinct():
    fields = 'model.query_key_dim:16,model.gamma_init:normal,model.branches:both,model.global_reduction:mean'
    found = names(f'{fields},optimizer.weight_decay:0.01,chunk_size')
    assert max(map(len, found)) <= 100
    assert len(set(found)) == 2


def test_flatten_is_what_changes_are_told_in():
    assert flatten({'a': {'b': 1, 'c': {'d': 2}}, 'e': 3}) == {'a.b': 1, 'a.c.d': 2, 'e': 3}
