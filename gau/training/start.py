"""How a run starts: who may write in its work directory, which checkpoint it goes on from, and what is said of it."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gau.errors import UserError, warn
from gau.objectives.objective import TrainBatches
from gau.training import distributed
from gau.training import mesh as meshes
from gau.training import workdir as files
from gau.training.checkpoints import Checkpoints, count_parameters
from gau.training.config import differences, library_versions
from gau.training.init_from import with_pretrained
from gau.training.setup import Run
from gau.training.step import TrainState


def pin_fork(run: Run, fork: Path) -> Path:
    """Returns the checkpoint that a new run starts from: the newest of the work directory `fork`, or `fork` itself.

    Raises:
      UserError: there is none, it is of another architecture, or at or beyond the end of the new run.
    """
    workdir, step = files.checkpoint_of(fork)
    files.read_config(workdir)
    parent = Checkpoints(workdir)
    try:
        step = parent.chosen(step, where=f'fork={fork}')
        parent.check_architecture(run.abstract_params, step)
    finally:
        parent.close()
    if step >= run.total_steps:
        raise UserError(
            f'fork={fork} is at step {step} already and this run ends at {run.total_steps}: give more steps'
        )
    return workdir / 'checkpoints' / str(step)


def begun_alike(run: Run, workdir: Path, stored: ConfigDict) -> str:
    """Says why the run in `workdir` cannot get the length of `run`: past steps would have had other learning rates.

    Args:
      run: what is asked for.
      workdir: of the run that is there.
      stored: its config, which is that of `run` but for its length.

    Returns:
      Nothing if all steps up to the newest checkpoint had the learning rate that they have in `run`, else the way out.
    """
    steps = files.checkpointed_steps(workdir)
    alike = run.same_rates_until(dataclasses.replace(run, config=stored))
    if not steps or (steps[-1] <= alike and steps[-1] <= run.total_steps):
        return ''
    if steps[-1] > run.total_steps:
        return f'it is at step {steps[-1]} already: start another work directory'
    before = [step for step in steps if step <= alike]
    fork = files.checkpoints_of(workdir) / str(before[-1]) if before else workdir
    return (
        f'another learning rate from step {alike} on, and it is at step {steps[-1]}: '
        f'start another work directory with --fork={fork}'
    )


@contextmanager
def claim(workdir: Path, run: Run) -> Iterator[bool]:
    """Takes the work directory for one run of all processes; yields whether a run with this config is there already.

    Raises:
      UserError: in every process: see `files.claim`; or the processes do not see the same directory.
    """
    token = ''
    with ExitStack() as stack:
        with distributed.together():
            if distributed.is_first():
                refusal = functools.partial(begun_alike, run, workdir)
                resumed = stack.enter_context(files.claim(workdir, run.config, of_other_length=refusal))
                token = os.urandom(8).hex() + str(int(resumed))
                (workdir / files.LOCK).write_text(token)
        token = distributed.of_first(token)
        with distributed.together():
            lock = workdir / files.LOCK
            if not lock.is_file() or lock.read_text() != token:
                raise UserError(f'--workdir={workdir} must lie on a file system that all processes share')
        yield token.endswith('1')


def keep_origin(config: ConfigDict, stored: ConfigDict) -> None:
    """Puts the `fork` and `init_from` that a resumed run began with into its config; warns if others are asked for.

    Only the names of work directories are compared: the project may have moved since.
    """
    for field in ('fork', 'init_from'):
        asked, settled = config[field], stored[field]
        if asked is not None and distributed.is_first():
            names = [files.checkpoint_of(Path(place))[0].name for place in (asked, settled) if place is not None]
            if len(names) == 1 or names[0] != names[1]:
                warn(f'{field}={asked} does nothing: the run began from {settled or stored.fork or "nothing"}')
        config[field] = settled


def first_state(run: Run, saved: Checkpoints, iterator: TrainBatches) -> tuple[TrainState, str]:
    """Returns the first state and where it came from; sets the iterator to the same place."""
    state = saved.restore(run.abstract_state, iterator=iterator)
    if state is not None:
        if distributed.is_first():
            _warn_of_changes(saved.meta(int(state.step)), run)
        return state, f'resumed at step {int(state.step)}'
    if run.config.init_from is not None:
        return _state_from_weights(run, saved, iterator)
    if run.config.fork is None:
        return run.init_state(), 'new run'
    checkpoint = Path(run.config.fork)
    parent_workdir, step = checkpoint.parent.parent, int(checkpoint.name)
    same_data = _goes_on_in_data(run.config, parent_workdir)
    parent = Checkpoints(parent_workdir)
    try:
        state = parent.restore(run.abstract_state, step=step, iterator=iterator if same_data else None)
    finally:
        parent.close()
    # At once a checkpoint of its own: the parent may go on and drop the one that this run stands on.
    saved.save(step, state, iterator, config=files.config_to_dict(run.config), data=run.data_identity)
    return state, f'forked from {checkpoint}' + ('' if same_data else ', data from their start')


def _goes_on_in_data(config: ConfigDict, parent_workdir: Path) -> bool:
    """Returns whether the parent's position in the data means something here: the same data in the same order."""
    changed = differences(files.config_to_dict(files.read_config(parent_workdir)), files.config_to_dict(config))
    changed = [line for line in changed if line.startswith(('data.', 'seed:', 'objective:'))]
    return not changed or files.only_moved(parent_workdir, config, changed)


def steps_over_data(run: Run) -> int | None:
    """Returns how many steps of data will have been read when the run ends; None: no longer known.

    A fork goes on in the data of the run before it, which may be a fork itself, or begins data of its own.
    """
    config = run.config
    while config.fork is not None:
        checkpoint = Path(config.fork)
        workdir, step = checkpoint.parent.parent, int(checkpoint.name)
        try:
            if not _goes_on_in_data(config, workdir):
                return run.total_steps - step
            config = files.read_config(workdir)
        except UserError:
            return None
    return run.total_steps


def introduction(run: Run, params: Any, origin: str) -> str:
    """Returns the line that says which run this is: model, size, devices, and where it starts from."""
    config = run.config
    quantization = '' if config.quantization == 'none' else f'{config.quantization} by qwix, '
    return (
        f'{config.model.name} ({config.model.size}), {count_parameters(params):,} parameters, '
        f'{run.devices}, attention: {run.model.implementation.attention}, {quantization}{origin}'
    )


def hints(run: Run, iterator: TrainBatches) -> Iterator[str]:
    """Yields a line for each setting that does less than it seems to, or that makes reading slow."""
    idle = meshes.idle(run.mesh.size, jax.device_count())
    if idle:
        yield idle
    keep_every, needed = run.config.checkpoint.keep_every, len(iterator.rows)
    if keep_every and keep_every % run.save_every:
        both = math.lcm(keep_every, run.save_every)
        yield (
            f'checkpoint.keep_every={keep_every} keeps every {both}th step only: '
            f'a run saves every {run.save_every} steps'
        )
    if iterator.rows_read > needed:
        yield (
            f'each process reads {iterator.rows_read} rows of a batch for the {needed} that it needs; '
            f'data.streams={run.config.data.batch_size // needed} would share the reading out'
        )


def write_tables(run: Run, params: Any, workdir: Path) -> None:
    """Writes what the parameters are and, over several devices, how they and the activations lie."""
    files.write_text(workdir / files.PARAMETERS, run.parameter_table(params))
    if run.mesh.size > 1:
        files.write_text(workdir / files.SHARDINGS, run.sharding_table())
    else:
        # Left by a part of the run that had more devices.
        (workdir / files.SHARDINGS).unlink(missing_ok=True)


def _state_from_weights(run: Run, saved: Checkpoints, iterator: TrainBatches) -> tuple[TrainState, str]:
    state = run.init_state()
    source = Path(run.config.init_from)
    params, drawn = with_pretrained(state.params, run.abstract_params, source, tokenizer=run.tokenizer)
    state = dataclasses.replace(state, params=params)
    # At once a checkpoint of its own: the source may be gone when the run is resumed.
    saved.save(0, state, iterator, config=files.config_to_dict(run.config), data=run.data_identity)
    return state, f'from the weights in {run.config.init_from}' + (f', drawn: {", ".join(drawn)}' if drawn else '')


def _warn_of_changes(meta: dict[str, Any], run: Run) -> None:
    """Says on stderr what the checkpoint was made with and this process no longer has."""
    for kind, now in (('data', run.data_identity), ('versions', library_versions())):
        before = meta.get(kind, {})
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                print(
                    f'warning: {name} has changed since the checkpoint ({before[name]} -> {now[name]}): '
                    'the run goes on, but not as it would have',
                    file=sys.stderr,
                )
