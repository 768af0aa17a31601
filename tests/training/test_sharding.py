"""Sharded equals single device, on 8 simulated devices in a process of its own (see sharded.py)."""

import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from gau.errors import UserError
from gau.training import config as training_config
from gau.training.mesh import MESH_AXES, over_data
from tests.programs import report
from tests.training.tiny import tiny_config

# data, fsdp, tensor, sequence. The first two use every axis, and pairs of axes that divide one array.
MESHES = ('2,2,2,1', '1,1,2,4')
MORE_MESHES = ('1,8,1,1', '8,1,1,1', '1,2,1,4')
SLOW = [
    pytest.param(model, objective, 'parameters', MESHES + MORE_MESHES, marks=pytest.mark.slow)
    for model in ('flash', 'flash_quad', 'transformer_plus_plus')
    for objective in ('lm', 'mlm')
]
SLOW += [
    pytest.param('flash', objective, 'parameters', MESHES, marks=pytest.mark.slow)
    for objective in ('causal_classification', 'classification')
]
SLOW.append(pytest.param('flash', 'lm', 'data', ('8,1,1,1', '4,1,1,2'), marks=pytest.mark.slow))


# `sharding`: of the optimizer.
@pytest.mark.parametrize(('model', 'objective', 'sharding', 'meshes'), [('flash', 'lm', 'data', MESHES), *SLOW])
def test_three_steps_on_any_mesh_equal_one_device(model, objective, sharding, meshes):
    found_on = report('tests.training.sharded', model, objective, sharding, *meshes)
    assert found_on.keys() == {'1,1,1,1', *meshes}
    alone = found_on['1,1,1,1']
    for shape, found in found_on.items():
        # Sums in another order: a few float32 roundings of a loss near 5.5 and of parameters near 0.1.
        assert found['loss_difference'] < 5e-6, shape
        assert found['parameter_difference'] < 5e-6, shape
        data, fsdp, tensor, _ = (int(size) for size in shape.split(','))
        # Two thirds are the optimizer's.
        parts = fsdp * tensor / (1 / 3 + 2 / 3 / data if sharding == 'data' else 1)
        if parts > 1:
            # Nearly every byte of the state is divided; what is not are vectors over small axes.
            assert found['state_bytes'] < 1.5 * alone['state_bytes'] / parts + 4096, shape
        assert found['argument_bytes'] < found['state_bytes'] + 20_000, shape
        if shape != '1,1,1,1':
            # An eighth, and what is whole everywhere.
            assert found['temporary_bytes'] < alone['temporary_bytes'] / 4, shape
        # No device ever holds more of the logits than its share.
        assert found['largest_array'] <= 1, shape


@pytest.mark.parametrize(('shape', 'spec', 'expected'), [
    ((12, 8), (None, None), ('data', None)),
    ((6, 8), (None, 'tensor'), (None, ('tensor', 'data'))),
    ((8, 6), ('fsdp', None), (('fsdp', 'data'), None)),
    ((4, 6), ('fsdp', None), ('fsdp', None)),
    ((3,), (None,), (None,)),
    ((), (), ()),
])  # fmt: skip
def test_where_zero_1_cuts_the_state_of_a_parameter(shape, spec, expected):
    mesh = AbstractMesh((4, 2, 2, 1), MESH_AXES)
    found = over_data(shape, NamedSharding(mesh, PartitionSpec(*spec)))
    assert found == NamedSharding(mesh, PartitionSpec(*expected))


def test_zero_1_is_refused_where_steps_need_whole_matrices():
    for name in ('muon', 'adafactor'):
        with pytest.raises(UserError, match=f'^optimizer.sharding=data is for adamw and lion, not {name}'):
            training_config.resolve(tiny_config(optimizer__name=name, optimizer__sharding='data'))
