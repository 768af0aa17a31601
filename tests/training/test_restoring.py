"""A checkpoint of any mesh opens on any other, on 8 simulated devices in a process of its own (see restored.py)."""

import pytest

from tests.programs import report


@pytest.mark.parametrize(
    'shapes',
    [
        # data, fsdp, tensor, sequence
        ['1,1,1,1', '1,8,1,1'],
        pytest.param(['1,1,1,1', '8,1,1,1', '1,8,1,1', '2,1,4,1', '2,2,2,1', '1,1,2,4'], marks=pytest.mark.slow),
    ],
    ids=lambda shapes: f'{len(shapes)} meshes',
)
def test_a_checkpoint_opens_on_every_mesh(shapes, tmp_path):
    found = report('tests.training.restored', 'matrix', tmp_path, *shapes)
    assert len(found) == len(shapes) ** 2
    for pair, difference in found.items():
        assert difference['state'] == difference['params'] == 0, pair
        assert difference['laid_out'], pair
        # Sums in another order: roundings in float32, which Adam's division enlarges at the first steps.
        assert difference['next_step'] < 1e-5, pair


@pytest.mark.slow
def test_a_run_is_forked_and_resumed_on_other_meshes(tmp_path):
    fork, straight = report('tests.training.restored', 'fork', tmp_path, '1,1,1,1', '1,8,1,1', '2,1,4,1')
    assert len(fork) == 2
    assert fork == pytest.approx(straight, abs=1e-5)
