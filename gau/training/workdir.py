"""The work directory: who may write in it, the files of the contract, and what a resumed run does to them."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.training.config import differences

CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
EVAL = 'eval.jsonl'
FINAL = 'final.json'
PARAMETERS = 'parameters.txt'


def config_to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as it reads back from JSON: tuples as lists."""
    return json.loads(config.to_json())


def config_from_dict(tree: dict[str, Any]) -> ConfigDict:
    """Returns the ConfigDict of a stored config; lists become tuples again."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return tuple(restore(entry) for entry in value)
        return value

    return ConfigDict(restore(tree))


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config of the run in `workdir`.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise UserError(f'--workdir={workdir} holds no run: {path} does not exist')
    try:
        return config_from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f'{path} is not valid JSON: {error}') from error


@contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[bool]:
    """Takes the work directory for one run; yields whether a run with this config is there already.

    Raises:
      UserError: it cannot be written, is not a directory, holds something else, holds a run with another config, or
        another process trains in it right now. Nothing in it has been touched then.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir={workdir} is not a directory')
    exists = (workdir / CONFIG).exists()
    if exists:
        changed = differences(config_to_dict(read_config(workdir)), config_to_dict(config))
        if changed:
            raise UserError(
                f'--workdir={workdir} holds a run with another config ({"; ".join(changed)}): '
                f'resume with the same config, or start another work directory with --fork={workdir}'
            )
    elif workdir.is_dir() and any(not entry.name.startswith('.') for entry in workdir.iterdir()):
        raise UserError(f'--workdir={workdir} is not empty and holds no run ({CONFIG} is missing): choose another')
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / '.lock', 'w')  # noqa: SIM115  held until the run ends, or dies
    except OSError as error:
        raise UserError(f'--workdir={workdir} cannot be written: {error.strerror}') from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f'--workdir={workdir}: another process is training there') from error
        yield exists


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    _replace(path, json.dumps(tree, indent=2) + '\n')


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file."""
    return json.loads(path.read_text())


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    _replace(path, text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def truncate_metrics(path: Path, *, last_step: int, keep_evaluations: bool) -> None:
    """Drops the lines that a run resumed after `last_step` will write again, so that each stands in the file once.

    Args:
      path: a metrics file; may be absent.
      last_step: lines of later steps go.
      keep_evaluations: whether the evaluations of `last_step` itself stay.
    """

    def stays(row: dict[str, Any]) -> bool:
        return row['step'] < last_step or (row['step'] == last_step and (keep_evaluations or row['split'] == 'train'))

    if path.exists():
        rows = [row for row in read_metrics(path) if stays(row)]
        _replace(path, ''.join(json.dumps(row) + '\n' for row in rows))


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f'.{path.name}.{os.getpid()}')
    with aside.open('w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
