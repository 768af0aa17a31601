"""Compiled kernels are kept where XLA's programs are. In all tests but the last a function stands for jax-triton."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gau.ops.kernels.kernel_cache import FOLDER, cached_on_disk
from gau.ops.kernels.launch import available, interpreted
from gau.ops.kernels.norm import scale_norm_of_residual


@dataclasses.dataclass
class Result:
    binary: str
    shared_mem_bytes: int
    llir: str | None = None


class Named:
    """A backend, or options."""

    def __init__(self, name: str):
        self.name = name

    def hash(self) -> str:
        return self.name


@pytest.fixture
def directory(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', str(tmp_path))
    yield tmp_path
    jax.config.update('jax_compilation_cache_dir', before)


@pytest.fixture
def compiled():
    """What was compiled so far."""
    return []


@pytest.fixture
def compiler(compiled):
    """Makes a new process's compiler."""

    def compile_kernel(module, backend, options, compute_capability):
        compiled.append((module, backend.name, options.name, compute_capability))
        return Result(f'ptx of {module}', len(module))

    def make(surroundings='1'):
        look_up = cached_on_disk(compile_kernel, Result, surroundings=lambda: surroundings)
        return lambda module, backend='sm', options='o', capability=90: look_up(
            module, Named(backend), Named(options), capability
        )

    return make


def test_what_one_process_compiled_another_reads(directory, compiler, compiled):
    first = compiler()('kernel')
    assert compiler()('kernel') == first == Result('ptx of kernel', 6)
    assert len(compiled) == 1
    assert [path.suffix for path in (directory / FOLDER).iterdir()] == ['.json']


def test_whatever_decides_what_is_compiled_is_asked_for(directory, compiler, compiled):
    compiler()('kernel')
    for other in ({'module': 'other'}, {'backend': 'other'}, {'options': 'other'}, {'capability': 100}):
        compiler()(**{'module': 'kernel'} | other)
    compiler(surroundings='2')('kernel')
    assert len(compiled) == 6


@pytest.mark.parametrize('why', ['no directory', 'switched off', 'to be dumped'])
def test_where_nothing_is_kept(directory, compiler, compiled, monkeypatch, why):
    if why == 'no directory':
        jax.config.update('jax_compilation_cache_dir', None)
    if why == 'to be dumped':
        monkeypatch.setenv('JAX_TRITON_DUMP_DIR', str(directory))
    jax.config.update('jax_enable_compilation_cache', why != 'switched off')
    try:
        assert compiler()('kernel') == compiler()('kernel')
    finally:
        jax.config.update('jax_enable_compilation_cache', True)
    assert len(compiled) == 2
    assert not list(directory.iterdir())


@pytest.mark.parametrize('text', ['', '{"binary": "half', '{"other": 1}', '[]'])
def test_a_damaged_file_is_compiled_and_written_again(directory, compiler, compiled, text):
    compiler()('kernel')
    (path,) = (directory / FOLDER).iterdir()
    path.write_text(text)
    assert compiler()('kernel') == compiler()('kernel') == Result('ptx of kernel', 6)
    assert len(compiled) == 2


def test_a_directory_that_takes_no_files_is_no_obstacle(directory, compiler, compiled):
    (directory / FOLDER).write_text('a file')
    assert compiler()('kernel') == compiler()('kernel')
    assert len(compiled) == 2


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(directory, compiler, compiled):
    compiler()('kernel')
    (path,) = (directory / FOLDER).iterdir()
    path.unlink()
    path.mkdir()
    assert compiler()('kernel') == Result('ptx of kernel', 6)
    assert list((directory / FOLDER).iterdir()) == [path]


@pytest.mark.skipif(interpreted() or not available(), reason='needs jax-triton and a GPU')
def test_kernels_are_kept(directory):
    x = jnp.ones((3, 5, 17))
    jax.jit(lambda x: scale_norm_of_residual(x, None, jnp.ones(()), None, 'float32'))(x)
    assert list((directory / FOLDER).iterdir())
