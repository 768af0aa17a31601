"""Sharded equals single device, on 8 simulated devices in a process of its own (see sharded.py)."""

import pytest

from tests.programs import report

# data, fsdp, tensor, sequence. The first two use every axis, and pairs of axes that divide one array.
MESHES = ('2,2,2,1', '1,1,2,4')
MORE_MESHES = ('1,8,1,1', '8,1,1,1', '1,2,1,4')
SLOW = [
    pytest.param(model, objective, MESHES + MORE_MESHES, marks=pytest.mark.slow)
    for model in ('flash', 'flash_quad', 'transformer_plus_plus')
    for objective in ('lm', 'mlm')
]


@pytest.mark.parametrize(('model', 'objective', 'meshes'), [('flash', 'lm', MESHES), *SLOW])
def test_three_steps_on_any_mesh_equal_one_device(model, objective, meshes):
    found_on = report('tests.training.sharded', model, objective, *meshes)
    assert found_on.keys() == {'1,1,1,1', *meshes}
    alone = found_on['1,1,1,1']
    for shape, found in found_on.items():
        # Sums in another order: a few float32 roundings of a loss near 5.5 and of parameters near 0.1.
        assert found['loss_difference'] < 5e-6, shape
        assert found['parameter_difference'] < 5e-6, shape
        _, fsdp, tensor, _ = (int(size) for size in shape.split(','))
        if fsdp * tensor > 1:
            # Nearly every byte of the state is divided; what is not are vectors over small axes.
            assert found['state_bytes'] < 1.5 * alone['state_bytes'] / (fsdp * tensor) + 4096, shape
        assert found['argument_bytes'] < found['state_bytes'] + 20_000, shape
        if shape != '1,1,1,1':
            # An eighth, and what is whole everywhere.
            assert found['temporary_bytes'] < alone['temporary_bytes'] / 4, shape
        # No device ever holds more of the logits than its share.
        assert found['largest_array'] <= 1, shape
