"""scripts/attention_ranks.py: the matrices are those that the layers compute, and their ranks those of known ones."""

import json

import numpy as np
import pytest

from gau.errors import UserError
from gau.experiments.attention_ranks import effective_rank, matrices, read, readable
from gau.training import loop
from gau.training.config import resolve
from tests.models.tiny import compile_fast, make, tokens
from tests.programs import call
from tests.training.tiny import tiny_config

# The chunk of `make`.
C = 5


def test_the_effective_rank_of_known_matrices():
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]
    assert effective_rank(3.0 * orthogonal[:, :7]) == pytest.approx(7)
    assert effective_rank(np.ones((20, 5))) == pytest.approx(1)
    assert effective_rank(np.zeros((4, 4))) == 0
    p = np.array([0.5, 0.25, 0.25])
    assert effective_rank(orthogonal[:, :3] * p) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    # Over heads the mean is taken.
    assert effective_rank(np.stack([np.eye(6), np.ones((6, 6))])) == pytest.approx((6 + 1) / 2)


def found(name, n=12, **fields):
    model, params = make(name, num_layers=1, dtype='float32', **fields)
    inputs_BN = tokens(1, n)
    ((layer, error),) = compile_fast(matrices(model))(params, {'inputs': inputs_BN})

    # What the layer's output projection makes of U * (A V).
    def written(params):
        return model.apply({'params': params}, inputs_BN, capture_intermediates=lambda module, _: module.name == 'out')

    kept = compile_fast(written)(params)[1]['intermediates']['blocks_0']
    (unit,) = {'gau', 'attention'} & kept.keys()
    (written_BND,) = kept[unit]['out']['__call__']
    out = params['blocks_0'][unit]['out']
    kernel_ED = out['kernel'].reshape(-1, written_BND.shape[-1])
    np.testing.assert_allclose(layer['UAV'] @ kernel_ED + out['bias'], written_BND[0], rtol=1e-4, atol=1e-5)
    return layer, float(error)


def test_a_times_v_is_what_attention_reads():
    layer, error = found('flash')
    assert error < 1e-5
    # Queries see their chunk and all before.
    assert layer['A'].shape == (1, 12, 12)
    assert not np.triu(layer['A'][0], 1).any()
    assert layer['A'][0, C:, :C].all()
    assert np.abs(layer['UAV'] - layer['AV']).max() > 1e-3


@pytest.mark.slow
def test_every_head_has_its_own_a():
    for name in ('flash_quad', 'transformer_plus_plus'):
        layer, error = found(name, num_heads=2, attention_function='softmax', gate='none')
        assert error < 1e-5
        np.testing.assert_allclose(layer['A'].sum(-1), np.ones((2, 12)), rtol=1e-5)
        assert np.abs(layer['A'][0] - layer['A'][1]).max() > 1e-3
        np.testing.assert_array_equal(layer['UAV'], layer['AV'])


@pytest.mark.slow
def test_the_command(tmp_path):
    loop.train(tiny_config(model__num_layers=1, model__num_heads=2, model__dtype='bfloat16'), tmp_path / 'run')
    code, out, err = call(
        'scripts/attention_ranks.py', f'{tmp_path}/run', '--sequences=2', f'--json={tmp_path}/ranks.jsonl'
    )
    assert code == 0, err
    (line,) = [json.loads(line) for line in (tmp_path / 'ranks.jsonl').read_text().splitlines()]
    ranks = [line.pop(name) for name in ('A', 'AV', 'UAV')]
    about = {'workdir': 'run', 'step': 6, 'model': 'flash', 'gate': 'silu', 'tokens': 48, 'width': 64, 'sequences': 2}
    assert line == about | {'layer': 0, 'heads': 2}
    assert all(1 < rank <= 48 for rank in ranks)
    assert len(set(ranks)) == 3
    assert 'gate silu' in out
    assert 'Mean over layers' in out
    code, _, err = call('scripts/attention_ranks.py', f'{tmp_path}/run', '--sequences=100000')
    assert (code, err.count('\n')) == (2, 1), err
    assert 'of the 100000 asked for' in err


def test_what_was_measured_is_read_again_and_drawn(tmp_path):
    about = {'step': 6, 'model': 'flash_quad', 'gate': 'silu', 'tokens': 48, 'width': 64, 'sequences': 2, 'heads': 1}
    lines = [
        about | {'workdir': name, 'layer': layer, 'A': 5.0 + layer, 'AV': 3.0, 'UAV': 7.0}
        for name in ('gau', 'other')
        for layer in range(2)
    ]
    (tmp_path / 'ranks.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    code, out, err = call('scripts/attention_ranks.py', f'{tmp_path}/ranks.jsonl', f'--plot={tmp_path}/ranks.png')
    assert code == 0, err
    assert out.count('flash_quad, gate silu') == 2
    assert ['gau', '5.5', '3.0', '7.0'] in [line.split() for line in out.splitlines()]
    assert (tmp_path / 'ranks.png').stat().st_size > 1000
    code, _, err = call('scripts/attention_ranks.py', f'{tmp_path}/ranks.jsonl', f'{tmp_path}/ranks.jsonl')
    assert (code, err.count('\n')) == (2, 1), err
    assert 'two models are called' in err
    without_model = {name: value for name, value in lines[0].items() if name != 'model'}
    for text in ('3', '[1]', '{"workdir": "gau"}', json.dumps(without_model), ''):
        (tmp_path / 'ranks.jsonl').write_text(text + '\n')
        with pytest.raises(UserError, match='cannot be read as the ranks of layers'):
            read(tmp_path / 'ranks.jsonl')


def test_a_file_that_cannot_be_written_is_said_before_measuring(tmp_path):
    (tmp_path / 'file').write_text('')
    for flag in ('json', 'plot'):
        code, out, err = call('scripts/attention_ranks.py', 'runs/nothing', f'--{flag}={tmp_path}/file/x')
        assert (code, out, err.count('\n')) == (2, '', 1), err
        assert f'--{flag}={tmp_path}/file/x cannot be written: ' in err


def test_no_work_directory_is_one_line():
    code, _, err = call('scripts/attention_ranks.py')
    assert (code, err.count('\n')) == (2, 1), err


def test_layers_that_cannot_be_looked_into():
    config = resolve(tiny_config(model__layer_stack='scan'))
    with pytest.raises(UserError, match=r'model\.layer_stack=scan'):
        readable(config)
