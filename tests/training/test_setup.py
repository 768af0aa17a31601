"""What a start costs: tracing a model, and importing."""

import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from gau.imports import without_pytorch
from gau.models import language_model
from gau.ops import mixed_chunk_attention
from gau.training.config import resolve
from gau.training.setup import Run
from tests.training.tiny import tiny_config


def count_calls(monkeypatch, owner, name) -> list:
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_parameters_are_traced_once(monkeypatch):
    """For shapes, for the optimizer, and to be drawn."""
    calls = count_calls(monkeypatch, language_model.LanguageModel, '__call__')
    run = Run.from_config(resolve(tiny_config()))
    run.check()
    _ = run.optimizer, run.abstract_params
    run.init_state()
    assert len(calls) == 1


def test_layers_are_traced_once(monkeypatch):
    """Of three alike the first one; the context is no other test's, or none might be traced at all."""
    calls = count_calls(monkeypatch, mixed_chunk_attention, '_chunked')
    run = Run.from_config(resolve(tiny_config(model__num_layers=3, model__impl='xla', data__context=53)))
    train_step, state = run.train_step(), run.abstract_state
    with run.context():
        train_step.trace(state, run.abstract_batch)
    # Once for the parameters, of one text, and once for the step, of a batch.
    assert len(calls) == 2


@pytest.mark.parametrize('before', [False, True])
def test_drawing_leaves_the_setting_of_random_bits_as_it_was(before):
    run = Run.from_config(resolve(tiny_config()))
    jax.config.update('jax_threefry_gpu_kernel_lowering', before)
    try:
        run.init_state()
        assert jax.config.jax_threefry_gpu_kernel_lowering == before
    finally:
        jax.config.update('jax_threefry_gpu_kernel_lowering', False)


def test_metrics_import_no_pytorch(tmp_path):
    """tensorboardX would, where it is installed; and who wants it later gets it."""
    (tmp_path / 'torch.py').write_text('Tensor = None')
    program = """
import sys
import types
from gau.training.metrics import MetricsWriter
MetricsWriter('.', first_step=0).close()
assert 'torch' not in sys.modules
import torch
"""
    path = {'PYTHONPATH': f'{tmp_path}:{Path(__file__).parents[2]}', 'JAX_PLATFORMS': 'cpu', 'HOME': str(tmp_path)}
    subprocess.run([sys.executable, '-c', program], env=path, cwd=tmp_path, check=True, timeout=120)


def test_pytorch_that_is_there_stays(monkeypatch):
    module = types.ModuleType('torch')
    monkeypatch.setitem(sys.modules, 'torch', module)
    with without_pytorch():
        import torch

        assert torch is module
    assert sys.modules['torch'] is module
