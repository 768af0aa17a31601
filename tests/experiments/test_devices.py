import pytest

from gau.errors import UserError
from gau.experiments import devices


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ('CUDA_VISIBLE_DEVICES', 'JAX_PLATFORMS', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
        monkeypatch.delenv(name, raising=False)


def test_runs_share_the_gpus_and_their_memory(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
    places = devices.find_places(4)
    assert [place.name for place in places] == ['gpu 2', 'gpu 5'] * 4
    assert places[1].environment == {'CUDA_VISIBLE_DEVICES': '5', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.230'}
    monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.6')
    assert devices.find_places(2)[0].environment['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.300'


def test_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert devices.find_places(2) == [devices.Place('cpu', {})] * 2
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert devices.find_places(1) == [devices.Place('cpu', {})]


def test_tpu_chips_are_not_shared(monkeypatch, tmp_path):
    for number in range(4):
        (tmp_path / f'accel{number}').touch()
    monkeypatch.setattr(devices, 'DEVICE_FILES', tmp_path)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert [place.environment['TPU_VISIBLE_CHIPS'] for place in devices.find_places(1)] == ['0', '1', '2', '3']
    with pytest.raises(UserError, match='one run at a time'):
        devices.find_places(2)
    monkeypatch.setattr(devices, 'DEVICE_FILES', tmp_path / 'newer')
    (tmp_path / 'newer' / 'vfio').mkdir(parents=True)
    for name in ('0', '1', 'vfio'):
        (tmp_path / 'newer' / 'vfio' / name).touch()
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    assert len(devices.find_places(1)) == 2
