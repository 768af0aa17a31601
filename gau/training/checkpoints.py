"""Saving and restoring a run with Orbax: state, data iterator, and what they were made with."""

import asyncio
import contextlib
import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, EveryNSteps, LatestN

from gau.errors import RunFailed, UserError
from gau.objectives.objective import TrainBatches
from gau.training import distributed
from gau.training.config import library_versions
from gau.training.interruption import Interrupted
from gau.training.mesh import path_name
from gau.training.step import TrainState

# Orbax gives a save up by the clock on the wall, which may jump (a machine that was asleep, a clock that was set): no
# jump is to end a run.
_PATIENCE_SECONDS = 10 * 365 * 86_400


class Checkpoints:
    """The checkpoints of one run, in `DIR/checkpoints/STEP/{state,data,meta}`.

    A checkpoint appears under its step only when it is complete (Orbax writes aside and renames), is written in the
    background, and holds the state, the position of the data iterator, the config and the library versions.
    """

    def __init__(self, workdir: Path, config: ConfigDict | None = None, *, keep_step: int | None = None):
        """Opens, without config for reading only; with the config's `checkpoint` section for writing as well.

        The checkpoint of `keep_step` is kept for good.
        """
        self.directory = Path(workdir).absolute() / 'checkpoints'
        self._writable = config is not None
        options = {'read_only': True, 'create': False}
        if config is not None:
            policies = [LatestN(config.keep_last)]
            if config.keep_every:
                policies.append(EveryNSteps(config.keep_every))
            if keep_step is not None:
                policies.append(CustomSteps([keep_step]))
            options = {
                'async_options': ocp.AsyncOptions(timeout_secs=_PATIENCE_SECONDS),
                'preservation_policy': AnyPreservationPolicy(policies),
                'cleanup_tmp_directories': True,
            }
        self._options = options
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Orbax warns of every directory that is opened for reading that it cannot be written.
        verbosity = logging.get_verbosity()
        logging.set_verbosity(verbosity if self._writable else min(verbosity, logging.ERROR))
        try:
            return ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(**self._options))
        finally:
            logging.set_verbosity(verbosity)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def chosen(self, step: int | None, *, where: str) -> int:
        """Returns `step`, or the newest that has a checkpoint.

        Raises:
          UserError: there is none; it begins with `where`.
        """
        steps = self.steps()
        found = max(steps, default=None) if step is None else step
        if found not in steps:
            raise UserError(f'{where}: no such checkpoint, {self.directory.parent} has {steps or "none"}')
        return found

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: TrainBatches,
        *,
        config: dict[str, Any],
        data: dict[str, str],
    ) -> None:
        """Starts saving; returns as soon as the device's memory has been copied. A step saved already is left alone.

        All processes must call it. What is stored does not depend on how many there are.
        """
        if step in self._manager.all_steps():
            return
        streams = {}
        for states in distributed.gather(json.dumps(iterator.get_state())):
            streams |= json.loads(states)
        meta = {'step': step, 'config': config, 'data': data, 'versions': library_versions()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(streams),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def wait(self) -> None:
        """Blocks until what was being saved is on disk; raises what went wrong on the way."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        # Of several processes one that fails alone would wait for others that do not come.
        if jax.process_count() == 1 or error is None or isinstance(error, UserError | RunFailed | Interrupted):
            self.close()

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what is stored beside the state: `step`, `config`, `data` (identity of each source), `versions`.

        None of it is needed to go on: it is empty if it was not copied along or cannot be read.
        """
        try:
            return self._read_json(step, 'meta')
        except Exception:  # Orbax promises no type.
            return {}

    def restore(
        self, abstract_state: TrainState, *, step: int | None = None, iterator: TrainBatches | None = None
    ) -> TrainState | None:
        """Restores the newest readable checkpoint onto the shardings of `abstract_state`; None if there is none.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings.
          step: this checkpoint alone; None means the newest that can be read, saying which ones could not.
          iterator: set to the position it was saved at, in place.

        Raises:
          UserError: the step asked for does not exist or is damaged; all are damaged; or the parameters are those of
            another architecture.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f'{self.directory} has no checkpoint of step {step}, only {steps or "none"}')
        candidates = [step] if step is not None else steps[::-1]
        for candidate in candidates:
            self.check_architecture(abstract_state.params, candidate)
            state, damage = None, ''
            try:
                args = ocp.args.StandardRestore(abstract_state)
                state = self._read(candidate, 'state', ocp.StandardCheckpointHandler(), args)
                if iterator is not None:
                    iterator.set_state(self.read_streams(candidate))
            except Exception as error:  # Orbax promises no type for a checkpoint that it cannot read.
                _end_unfinished_reads()
                if 'RESOURCE_EXHAUSTED' in str(error):
                    raise
                damage = _first_line(error)
            # Each process reads its own part; one that is damaged makes the whole worthless to all.
            damage = next(filter(None, distributed.gather(damage)), '')
            if damage:
                if distributed.is_first():
                    where = self.directory / str(candidate)
                    print(f'warning: checkpoint {where} is damaged and passed over ({damage})', file=sys.stderr)
                continue
            if self._writable and step is None:
                self._set_aside([later for later in steps if later > candidate])
            return state
        if candidates:
            raise UserError(f'no checkpoint in {self.directory} can be read: {candidates} are damaged')
        return None

    def restore_params(self, abstract_params: Any, *, step: int) -> Any:
        """Restores the parameters alone, for evaluation or as a start, onto the shardings of `abstract_params`.

        Raises:
          UserError: the checkpoint is damaged, or its parameters are those of another architecture.
        """
        self.check_architecture(abstract_params, step)
        partial = ocp.args.PyTreeRestore(
            item={'params': abstract_params},
            restore_args={'params': ocp.checkpoint_utils.construct_restore_args(abstract_params)},
            partial_restore=True,
        )
        try:
            return self._read(step, 'state', ocp.PyTreeCheckpointHandler(), partial)['params']
        except Exception as error:
            _end_unfinished_reads()
            raise UserError(f'checkpoint {self.directory / str(step)} is damaged ({_first_line(error)})') from error

    def read_params(self, step: int) -> Any:
        """Returns the parameters alone as NumPy arrays, whole in every process, whatever model they are of.

        Raises:
          UserError: the checkpoint is damaged.
        """
        try:
            stored = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.directory / str(step) / 'state')).tree
            wanted = jax.tree.map(
                lambda leaf: np.empty(leaf.shape, leaf.dtype),
                stored['params'],
                is_leaf=lambda node: hasattr(node, 'shape'),
            )
            partial = ocp.args.PyTreeRestore(
                item={'params': wanted},
                restore_args={'params': jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)},
                partial_restore=True,
            )
            return self._read(step, 'state', ocp.PyTreeCheckpointHandler(), partial)['params']
        except Exception as error:
            _end_unfinished_reads()
            raise UserError(f'checkpoint {self.directory / str(step)} is damaged ({_first_line(error)})') from error

    def _read(self, step: int, item: str, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs) -> Any:
        # Past the manager, at whose end all processes wait for each other: one that cannot read would not come.
        return handler.restore(epath.Path(self.directory / str(step) / item), args=args)

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        return self._read(step, item, ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())

    def read_streams(self, step: int) -> dict[str, Any]:
        """Returns where the data stood, by stream."""
        # Before there was `data.streams`, the one stream's state was written by Grain.
        alone = self.directory / str(step) / 'data' / 'process_0-of-1.json'
        return {'0': json.loads(alone.read_text())} if alone.is_file() else self._read_json(step, 'data')

    def check_architecture(self, abstract_params: Any, step: int) -> None:
        """Raises UserError at the first parameter in which a stored tree differs from the one wanted."""
        directory = self.directory / str(step)
        try:
            stored = _shapes(ocp.PyTreeCheckpointHandler().metadata(epath.Path(directory / 'state')).tree['params'])
        except Exception:
            return  # Damaged: restoring will say so.
        wanted = _shapes(abstract_params)
        for name in sorted(wanted.keys() | stored.keys()):
            if wanted.get(name) != stored.get(name):
                raise UserError(
                    f'checkpoint {directory} is of another architecture: {name} is {stored.get(name, "absent")} there '
                    f'and {wanted.get(name, "absent")} in the config'
                )

    def _set_aside(self, damaged: list[int]) -> None:
        """Moves damaged checkpoints out of the way of the run that will reach their steps again; deletes nothing."""
        for step in damaged if distributed.is_first() else ():
            target = self.directory.parent / 'damaged_checkpoints' / str(step)
            target.parent.mkdir(exist_ok=True)
            shutil.move(self.directory / str(step), _free_name(target))
        if damaged:
            distributed.gather('moved')
            self._manager.close()
            self._manager = self._open()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, 'shape'))
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:200] if lines else ""}'


def _end_unfinished_reads() -> None:
    """Ends the reads that Orbax leaves half done, in a loop that it has closed, when one of them fails.

    Nobody would wait for them any more: whenever they were collected, each would print a traceback, behind whatever the
    program has come to by then.
    """
    for task in gc.get_objects():
        if not isinstance(task, asyncio.Task) or not task.get_loop().is_closed():
            continue
        with contextlib.suppress(Exception, asyncio.CancelledError):
            if task.done():
                task.exception()
            else:
                # Orbax answers its being ended with an exception of its own.
                task.get_coro().close()


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f'{path.name}.{number}') for number in range(1, 1000))]
    return next(name for name in names if not name.exists())


def abstract(state_shapes: Any, shardings: Any) -> Any:
    """Returns the tree of jax.ShapeDtypeStruct that restoring needs: shapes and dtypes with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state_shapes, shardings
    )


def count_parameters(params: Any) -> int:
    """Returns the number of parameters of a tree of (abstract) arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
