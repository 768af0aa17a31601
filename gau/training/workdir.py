"""The work directory: who may write in it, the files of the contract, and what a resumed run does to them."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gau import strict_json
from gau.data import places
from gau.errors import UserError
from gau.models.fields import GONE, without_gone
from gau.training.config import default_config, differences, drop_idle_fields, resolve, with_new_fields

CONFIG = 'config.json'
DATA = 'data.json'
METRICS = 'metrics.jsonl'
DROPPED = 'metrics.dropped.jsonl'
EVAL = 'eval.jsonl'
FINAL = 'final.json'
DIVERGED = 'diverged.json'
COMPRESSION = 'compression.json'
PARAMETERS = 'parameters.txt'
SHARDINGS = 'shardings.txt'
LOCK = '.lock'
# The end of what a run says whose work directory is held by another one.
TAKEN = 'another process is training there'
# How long a run is: may change on resume as far as the steps done stay what they were.
_LENGTH = ('steps: ', 'tokens: ', 'epochs: ')

# The default up to e74d9a2; no parameter is called embedding, so that the one of today decides alike.
OLD_DECAY_RULES = [['(^|/)(kernel|embedding)$', 1.0]]


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
    """Returns the config of the run in `workdir`; fields that did not exist when it began have their defaults.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise UserError(f'--workdir={workdir} holds no run: {path} does not exist')
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'{path} is not valid JSON: {error}{_copy_of_config(path)}') from error
    try:
        return whole_config(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'{path} is not the config of a run ({error!r}){_copy_of_config(path)}') from error


def _copy_of_config(path: Path) -> str:
    """Says where the config of a damaged config.json still is."""
    copies = [checkpoints_of(path.parent) / str(step) / 'meta' / 'metadata' for step in checkpointed_steps(path.parent)]
    found = next((copy for copy in reversed(copies) if copy.is_file()), None)
    return f'; {found} has it under "config"' if found else ''


def checkpoints_of(workdir: Path) -> Path:
    """Returns the directory that the checkpoints of a run lie in, each under its step."""
    return Path(workdir) / 'checkpoints'


def checkpoint_of(path: Path) -> tuple[Path, int | None]:
    """Returns the work directory and the step that `DIR/checkpoints/STEP` means; any other path is a work directory."""
    is_checkpoint = path.parent.name == 'checkpoints' and path.name.isdecimal()
    return (path.parent.parent, int(path.name)) if is_checkpoint else (path, None)


def checkpointed_steps(workdir: Path) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first, whether they can be read or not."""
    directory = checkpoints_of(workdir)
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def what_is_safe(workdir: Path) -> str:
    """Says what is safe of a run that could not save."""
    steps = checkpointed_steps(workdir)
    return f'the checkpoint of step {steps[-1]} is safe' if steps else 'there is no checkpoint yet'


def whole_config(stored: dict[str, Any]) -> ConfigDict:
    """Returns the ConfigDict of a stored config in the fields of today.

    Fields that did not exist when it was stored have their defaults. Those that are gone are left out, unless it made
    use of them: then it is no config of today but for the others, and whoever compares or uses it says so.
    """
    defaults = config_to_dict(default_config())
    model = without_gone(stored.get('model', {}))
    stored = {**stored, 'model': model}
    whole = with_new_fields(stored, defaults)
    if 'relative_bias_init' not in model and model.get('attention_function') == 'relu2':
        # There was one start only, the paper's, where there was a relative bias.
        start = 'normal' if model.get('relative_bias') in ('toeplitz', 'rotary') else None
        whole = {**whole, 'model': {**whole['model'], 'relative_bias_init': start}}
    if whole['optimizer']['weight_decay_rules'] == OLD_DECAY_RULES:
        rules = defaults['optimizer']['weight_decay_rules']
        whole = {**whole, 'optimizer': {**whole['optimizer'], 'weight_decay_rules': rules}}
    config = config_from_dict(whole)
    drop_idle_fields(config.optimizer)
    if whole == stored:
        return config
    used = {name: value for name, value in model.items() if name in GONE}
    try:
        # Other fields may decide what a new one means, but for those that are gone.
        others = config.copy_and_resolve_references()
        for name in used:
            del others.model[name]
        others = resolve(others)
    except UserError:
        return config
    with others.model.unlocked():
        others.model.update(used)
    return others


@contextmanager
def claim(
    workdir: Path, config: ConfigDict, *, of_other_length: Callable[[ConfigDict], str] | None = None
) -> Iterator[bool]:
    """Takes the work directory for one run; yields whether a run with this config is there already.

    Args:
      workdir: the directory.
      config: the run's, resolved.
      of_other_length: says why the run there, whose config it is given with the data where it lies now, cannot be made
        as long as this one, or nothing if it can; None takes only the same length.

    Raises:
      UserError: it cannot be written, is not a directory, holds something else, holds a run with another config, or
        another process trains in it right now. Nothing in it has been touched then.
    """
    workdir = Path(workdir)
    _holds_this_run(workdir, config, of_other_length)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / LOCK, 'a')  # noqa: SIM115  held until the run ends, or dies
    except OSError as error:
        raise UserError(f'--workdir={workdir} cannot be written: {error.strerror}') from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f'--workdir={workdir}: {TAKEN}') from error
        # Looked at again: another process may have begun a run between the first look and the lock.
        yield _holds_this_run(workdir, config, of_other_length)


def _holds_this_run(
    workdir: Path, config: ConfigDict, of_other_length: Callable[[ConfigDict], str] | None = None
) -> bool:
    """Returns whether a run with this config is there; raises UserError if anything else is."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir={workdir} is not a directory')
    if (workdir / CONFIG).exists():
        stored = read_config(workdir)
        changed = differences(config_to_dict(stored), config_to_dict(config))
        length = [line for line in changed if line.startswith(_LENGTH)]
        others = [line for line in changed if line not in length]
        if (others and not only_moved(workdir, config, others)) or (length and of_other_length is None):
            fork = (
                f' with --fork={workdir}' if checkpointed_steps(workdir) else ' (it has no checkpoint to --fork from)'
            )
            what = 'another config' if length or not _are_places(others) else 'other data'
            raise UserError(
                f'--workdir={workdir} holds a run with {what} ({"; ".join(changed)}): '
                f'resume with the same, or start another work directory{fork}'
            )
        # The same data, whose length it may ask for, where it lies now.
        stored.data.update({field: config.data[field] for field in places.FIELDS})
        refusal = of_other_length(stored) if length else ''
        if refusal:
            raise UserError(f'--workdir={workdir} holds a run of another length ({"; ".join(length)}): {refusal}')
        return True
    if workdir.is_dir() and any(not entry.name.startswith('.') for entry in workdir.iterdir()):
        raise UserError(f'--workdir={workdir} is not empty and holds no run ({CONFIG} is missing): choose another')
    return False


def only_moved(workdir: Path, config: ConfigDict, changed: list[str]) -> bool:
    """Returns whether `changed`, from `differences`, is only where the run's data lies, and the data is the same."""
    if not _are_places(changed):
        return False
    recorded = _read_whole(workdir / DATA, 'contents')
    if recorded is not None:
        return places.are_same(recorded, config.data)
    # Begun by an earlier version: its checkpoints know. Imported late: this imports JAX.
    from gau.training.checkpoints import Checkpoints

    saved = Checkpoints(workdir)
    try:
        identities = [saved.meta(step).get('data') for step in saved.steps()[-1:]]
    finally:
        saved.close()
    if not any(identities):
        return False
    return places.are_as_identified(identities[0], read_config(workdir).data, config.data)


def _are_places(changed: list[str]) -> bool:
    return all(line.startswith(tuple(f'data.{field}: ' for field in places.FIELDS)) for line in changed)


def keep_config(workdir: Path, config: ConfigDict) -> None:
    """Writes the config and what the data are; where these are written, updates only length and places of the data."""
    wanted = config_to_dict(config)
    found = read_json(workdir / CONFIG) if (workdir / CONFIG).exists() else wanted
    there = {field: wanted['data'][field] for field in places.FIELDS}
    length = {field: wanted[field] for field in ('steps', 'tokens', 'epochs')}
    kept = found | length | {'data': found.get('data', wanted['data']) | there}
    if kept != found or not (workdir / CONFIG).exists():
        write_json(workdir / CONFIG, kept)
    if kept != found or _read_whole(workdir / DATA, 'contents') is None:
        write_json(workdir / DATA, places.record(config.data, workdir))


def take_back(workdir: Path) -> None:
    """Removes what `keep_config` wrote, so that a run which could not begin can be started in another way."""
    try:
        checkpoints_of(workdir).rmdir()
    except OSError:
        # It has begun after all.
        return
    for name in (CONFIG, DATA):
        (workdir / name).unlink(missing_ok=True)


def with_data_found(workdir: Path, config: ConfigDict) -> ConfigDict:
    """Returns the config of the run in `workdir` with its data where it is now, if the project has moved."""
    recorded = _read_whole(workdir / DATA, 'contents')
    if recorded is None:
        return config
    config = config.copy_and_resolve_references()
    config.data = places.found_again(recorded, config.data, workdir)
    return config


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all; numbers that are not finite as `gau.strict_json` says."""
    _replace(path, strict_json.dumps(tree, indent=2) + '\n')


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file."""
    return json.loads(path.read_text())


def read_final(workdir: Path) -> dict[str, Any] | None:
    """Returns the result of the run in `workdir`; None if it has none yet, or none that can be read."""
    return _read_whole(Path(workdir) / FINAL, 'step')


def read_diverged(workdir: Path) -> int | None:
    """Returns the step at which the last start of the run in `workdir` met a loss or gradient that is not finite."""
    found = _read_whole(Path(workdir) / DIVERGED, 'step')
    return found and found['step']


def _read_whole(path: Path, field: str) -> dict[str, Any] | None:
    """Returns a JSON object that can be made again, such as the result; None if it is missing or damaged."""
    try:
        tree = strict_json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and field in tree else None


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    _replace(path, text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; one that a kill or a full disk cut short is left out."""
    return [row for _, row in _metrics_lines(path) if row is not None]


def end_last_line(path: Path) -> None:
    """Ends a line that a kill cut short, so that what is appended stands on its own."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b'\n'):
        with path.open('a') as file:
            file.write('\n')


def kept_metrics(path: Path, *, last_step: int, keep_evaluations: bool) -> list[dict[str, Any]]:
    """Returns the lines that `truncate_metrics` leaves or has left, without touching the file."""
    return [row for _, row in _metrics_lines(path) if _stays(row, last_step, keep_evaluations)]


def truncate_metrics(path: Path, *, last_step: int, keep_evaluations: bool) -> list[dict[str, Any]]:
    """Drops the lines that a run resumed after `last_step` will write again, so that each stands in the file once.

    What is dropped goes to the end of metrics.dropped.jsonl beside it: the checkpoints may have been lost, not the run.

    Args:
      path: a metrics file; may be absent.
      last_step: lines of later steps go.
      keep_evaluations: whether the evaluations of `last_step` itself stay.

    Returns:
      The lines that stay.
    """
    lines = _metrics_lines(path)
    whole = not lines or path.read_bytes().endswith(b'\n')
    stays = [_stays(row, last_step, keep_evaluations) for _, row in lines]
    if not all(stays) or not whole:
        with path.with_name(DROPPED).open('a') as file:
            file.writelines(text + '\n' for (text, _), stay in zip(lines, stays, strict=True) if not stay)
        _replace(path, ''.join(text + '\n' for (text, _), stay in zip(lines, stays, strict=True) if stay))
    return [row for (_, row), stay in zip(lines, stays, strict=True) if stay]


def _stays(row: dict[str, Any] | None, last_step: int, keep_evaluations: bool) -> bool:
    if row is None or row['step'] > last_step:
        return False
    return row['step'] < last_step or keep_evaluations or row['split'] == 'train'


def _metrics_lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    lines = []
    for text in path.read_text(errors='backslashreplace').splitlines() if path.exists() else []:
        try:
            row = strict_json.loads(text)
        except ValueError:
            row = None
        right = isinstance(row, dict) and isinstance(row.get('step'), int) and isinstance(row.get('split'), str)
        lines.append((text, row if right else None))
    return lines


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f'.{path.name}.{os.getpid()}')
    with aside.open('w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
