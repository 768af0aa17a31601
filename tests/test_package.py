"""The package: dependencies stated once, a cheap import, an install, and README's lines for a notebook."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())


def requirements(path):
    lines = (line.split('#')[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def readme_snippet():
    """Returns the Python of README.md that opens a run."""
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    (snippet,) = (block for block in blocks if 'import gau' in block)
    return snippet


@pytest.fixture(scope='module')
def folder(tiny_run, tmp_path_factory):
    """A folder with a trained run where README's lines expect it."""
    folder = tmp_path_factory.mktemp('notebook')
    shutil.copytree(tiny_run, folder / 'runs/first')
    return folder


def test_every_requirements_file_is_stated_once_and_nowhere_else():
    dynamic = PYPROJECT['tool']['setuptools']['dynamic']
    tables = [dynamic['dependencies'], *dynamic['optional-dependencies'].values()]
    assert sorted(name for table in tables for name in table['file']) == sorted(
        path.name for path in ROOT.glob('requirements*.txt')
    )
    for extra, table in dynamic['optional-dependencies'].items():
        assert table['file'] == [f'requirements-{extra}.txt']
    assert {'dependencies', 'optional-dependencies'} <= set(PYPROJECT['project']['dynamic'])
    # setuptools reads requirements, one a line; it refuses options such as -r.
    for path in ROOT.glob('requirements*.txt'):
        assert requirements(path)


def test_import_gau_brings_nothing_with_it(tmp_path):
    program = 'import sys, gau; print(sorted({name.split(".")[0] for name in sys.modules} & {"jax", "flax", "numpy"}))'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ('[]', '')


def test_an_unknown_name_is_refused():
    import gau

    with pytest.raises(AttributeError, match='no attribute'):
        _ = gau.load_runs


def test_the_lines_of_the_readme_open_a_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(readme_snippet(), names)
    assert names['step'] == 6
    assert names['logits'].shape == (*names['tokens'].shape, names['run'].tokenizer.vocab_size)
    assert names['logits'].dtype == 'float32'


@pytest.mark.slow
def test_an_installed_package_opens_a_run(folder, tmp_path):
    """Both kinds of install, in an environment that has nothing else, from a directory that is not the clone."""
    source = tmp_path / 'source'
    source.mkdir()
    shutil.copytree(ROOT / 'gau', source / 'gau', ignore=shutil.ignore_patterns('__pycache__'))
    for path in (ROOT / 'pyproject.toml', ROOT / 'README.md', ROOT / 'LICENSE', *ROOT.glob('requirements*.txt')):
        shutil.copy(path, source)
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv/bin/python'
    report = """
import importlib.metadata, json
print(json.dumps([gau.__file__, importlib.metadata.requires('gau'), logits.shape[-1]]))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    for arguments, where in ((['.'], tmp_path / 'venv'), (['--no-deps', '-e', '.'], source)):
        pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', *arguments]
        subprocess.run(pip, cwd=source, env=environment, check=True)
        done = subprocess.run(
            [python, '-c', readme_snippet() + report], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        file, required, vocab_size = json.loads(done.stdout.splitlines()[-1])
        assert file.startswith(str(where))
        assert vocab_size > 256
        named = {Requirement(line).name for line in required if 'extra ==' not in line}
        assert named == {requirement.name for requirement in requirements(ROOT / 'requirements.txt')}
        extras = {match[1] for line in required if (match := re.search(r'extra == "(\w+)"', line))}
        assert extras == {path.stem.removeprefix('requirements-') for path in ROOT.glob('requirements-*.txt')}
