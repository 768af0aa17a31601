"""What a start costs: tracing a model, and importing."""

import contextlib
import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from gau.imports import without_pytorch
from gau.models import language_model
from gau.objectives.text import TextObjective
from gau.ops import mixed_chunk_attention
from gau.ops.kernels import gated_mixed_chunk, queries_keys
from gau.training.config import resolve
from gau.training.setup import Run, use_compilation_cache
from tests.training.tiny import assert_trees_equal, tiny_config


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
    state, params = run.init_state(), run.init_params()
    assert_trees_equal(params, state.params)
    assert len(calls) == 1


def test_all_seeds_draw_with_one_program():
    """Or each seed of a sweep would compile its own."""
    runs = [Run.from_config(resolve(tiny_config(seed=seed))) for seed in (0, 1)]
    first, second = (jax.jit(run._init).lower(run.config.seed).as_text() for run in runs)
    assert first == second


@pytest.mark.parametrize(
    ('impl', 'module', 'function'),
    [
        ('xla', mixed_chunk_attention, '_chunked'),
        ('triton', gated_mixed_chunk, '_scans'),
        ('triton', queries_keys, '_queries_and_keys'),
    ],
)
def test_layers_are_traced_once(monkeypatch, impl, module, function):
    """Of three alike the first one; the context is no other test's, or none might be traced at all."""
    calls = count_calls(monkeypatch, module, function)
    context = 53 + (function == '_scans')
    run = Run.from_config(resolve(tiny_config(model__num_layers=3, model__impl=impl, data__context=context)))
    train_step, state = run.train_step(), run.abstract_state
    with run.context():
        train_step.trace(state, run.abstract_batch)
    # Once for the parameters, of one text, and once for the step, of a batch.
    assert len(calls) == 2


@pytest.mark.parametrize('devices', [1, 2])
def test_random_bits_are_drawn_by_a_kernel_on_one_device(devices, monkeypatch):
    """And the setting is as it was after it, whatever happens."""
    settings = []

    def init(*args, **kwargs):
        settings.append(jax.config.jax_threefry_gpu_kernel_lowering)
        raise RuntimeError

    monkeypatch.setattr(TextObjective, 'init', init)
    monkeypatch.setattr(Run, 'context', lambda self: contextlib.nullcontext())
    run = dataclasses.replace(Run.from_config(resolve(tiny_config())), mesh=types.SimpleNamespace(size=devices))
    with pytest.raises(RuntimeError):
        _ = run.abstract_params
    assert settings == [devices == 1]
    assert not jax.config.jax_threefry_gpu_kernel_lowering


def test_metrics_import_no_pytorch(tmp_path):
    """tensorboardX would, where it is installed; and who wants it later gets it."""
    (tmp_path / 'torch.py').write_text('Tensor = None')
    program = """
import sys
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


def test_a_cache_that_cannot_be_written_is_said_once_and_not_used(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('')
    used = {}
    monkeypatch.setattr(jax.config, 'update', used.__setitem__)
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    for directory in ('file/cache', 'file/cache', 'cache', 'gs://bucket/cache'):
        where = directory if '://' in directory else f'{tmp_path}/{directory}'
        used.clear()
        monkeypatch.setenv('GAU_COMPILATION_CACHE', where)
        use_compilation_cache()
        assert used == ({} if 'file' in directory else {'jax_compilation_cache_dir': where})
    told = f'warning: {tmp_path}/file/cache cannot be written (Not a directory): compiled programs are not kept\n'
    assert capsys.readouterr().err == told
    assert (tmp_path / 'cache').is_dir()
