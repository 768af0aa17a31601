import pytest

from tests.programs import call


def describe(*arguments):
    code, out, err = call('scripts/describe.py', *arguments)
    assert code == 0, err
    return out


def test_a_config_is_taken_apart():
    out = describe('--config=configs/lm.py:model=flash,size=base', '--contexts=512,8192')
    lines = out.splitlines()
    assert lines[0].startswith('flash, lm, vocabulary 32,000')
    assert lines[1] == 'MiB of the decoding state of a sequence: 39.03 @512, 39.03 @8192'
    layers = next(line for line in lines if line.startswith('layer 0 to 23, each'))
    # The last of each: kilobytes a token, with the relative bias of a chunk to two, 128 kB, shared by the context.
    assert layers.split()[-5:] == ['3,643,649', '8.701', '31.5', '8.701', '31.0']
    assert lines[-1].split()[:2] == ['total', '112,023,577']


def test_models_stand_side_by_side():
    out = describe('--config=configs/lm.py:size=base', '--models=flash,transformer_plus_plus', '--contexts=512')
    rows = dict(line.split()[:2] for line in out.splitlines() if len(line.split()) > 1)
    assert [line.split()[-1] for line in out.splitlines()[2:4]] == ['39.00', '18.00']
    assert rows['flash'] == '112,002,050'
    assert rows['transformer_plus_plus'] == '109,644,289'


def test_parameters_are_those_of_each_context():
    models = '--models=linformer,flash_quad'
    both = describe('--config=configs/mlm.py:size=base', models, '--contexts=512,8192')
    assert 'parameters @512' in both
    alone = [describe('--config=configs/mlm.py:size=base', models, f'--contexts={n}') for n in (512, 8192)]
    short, long = (out.splitlines()[2].split()[1] for out in alone)
    assert short != long
    line = both.splitlines()[2].split()
    assert (line[0], line[1], line[5]) == ('linformer', short, long)
    one = describe('--config=configs/mlm.py:model=linformer,size=base', '--contexts=512,8192')
    total = one.splitlines()[-1].split()
    assert (total[0], total[1], total[4]) == ('total', short, long)


def test_fields_are_explained():
    out = describe('--config=configs/lm.py:model=performer', '--fields')
    assert 'model.feature_map: relu | favor, default relu\n' in out
    assert 'chunk_size' not in out


@pytest.mark.parametrize(('argument', 'message'), [
    ('--models=flsh', 'did you mean "flash"'),
    ('--models=linformer', 'cannot be a causal language model'),
    ('--contexts=0', 'is not a positive integer'),
    ('--models=', '--models names none'),
    ('--models=flash --fields', 'with --models it does nothing'),
    ('--config.objective=os:path', 'objective="os:path" is no class, but module'),
    ('--config.objective=:', 'objective=":" cannot be imported'),
])  # fmt: skip
def test_wrong_usage_is_one_line(argument, message):
    code, _, err = call('scripts/describe.py', '--config=configs/lm.py', *argument.split())
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
