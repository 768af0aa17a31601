"""The same steps over several meshes; what several devices make of it is shown in tests/training/test_sharding.py."""

import jax
import pytest

from gau.benchmarks import meshes
from gau.errors import UserError
from gau.training import config as training_config
from tests.training.tiny import tiny_config

ALONE = (1, 1, 1, 1)


# Whole steps on meshes equal one device in tests/training/test_sharding.py.
@pytest.mark.slow
def test_the_same_mesh_twice_gives_the_same_steps():
    first, second = meshes.train_over(training_config.resolve(tiny_config()), [ALONE, ALONE], steps=4)
    assert first.mesh == ALONE
    assert first.impl == 'xla'
    assert len(first.losses) == 4
    assert first.losses[0] != first.losses[-1]
    assert second.difference(first) == 0
    assert second.parameter_norm == first.parameter_norm
    assert first.tokens_per_second > 0


def test_what_does_not_fit_into_memory_is_one_line(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 75 GiB')

    monkeypatch.setattr(meshes.Run, 'train_step', lambda run: full)
    with pytest.raises(UserError, match=r'^mesh 1x1x1x1: a step does not fit'):
        list(meshes.train_over(training_config.resolve(tiny_config()), [ALONE], steps=4))
