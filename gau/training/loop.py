"""The training loop: resume, step, log, evaluate, save, stop."""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gau import plots
from gau.data.passes import Passes, told
from gau.errors import NoSpace, RunFailed, UserError, chain, is_no_space
from gau.evaluation.evaluator import Cancelled, Case, Evaluator, Metrics, is_scalar
from gau.objectives.objective import TrainBatches
from gau.training import distributed, lost_process, lowest, start
from gau.training import mesh as meshes
from gau.training import workdir as files
from gau.training.ahead import Ahead
from gau.training.batches import local_rows, put_batch
from gau.training.checkpoints import Checkpoints, count_parameters
from gau.training.config import library_versions, resolve
from gau.training.init_from import with_pretrained
from gau.training.interruption import NO_BATCH, Interrupted, Interruption
from gau.training.lost_process import LostProcess
from gau.training.metrics import MetricsReader, MetricsWriter, Progress
from gau.training.setup import Run, use_compilation_cache
from gau.training.step import TrainState
from gau.training.throughput import Clock


class NotFinite(RunFailed):
    """The loss or a gradient became NaN or infinite, at `step`."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains the config's model in `workdir`, resuming what is there; returns what final.json says.

    The run starts from the first that exists: its own newest readable checkpoint; the newest one of the work
    directory `config.fork`; the exported weights `config.init_from`; freshly drawn parameters.

    Raises:
      UserError: config, data or work directory are unusable.
      Interrupted: a signal asked to stop, and the state is saved.
      NotFinite: the loss diverged; the message names step, culprits and the last good checkpoint. `diverged.json` has
        it, until the run is started again.
      NoSpace: the disk is full; the message says what is safe.
      RunFailed: so does this one, where a save was given up by the clock.
      LostProcess: and this one, where another process of the run has died.
    """
    workdir = Path(workdir)
    try:
        with lost_process.told(lambda: f'--workdir={workdir}: {files.what_is_safe(workdir)}; the same commands go on'):
            return _train(resolve(config), workdir)
    except LostProcess:
        raise
    except NotFinite as error:
        if distributed.is_first():
            files.write_json(workdir / files.DIVERGED, {'step': error.step, 'error': str(error)})
        raise
    except Exception as error:
        safe = f'--workdir={workdir}: {files.what_is_safe(workdir)}'
        if is_no_space(error):
            raise NoSpace(f'no space left for {safe}; when there is room the same command goes on') from error
        if any(isinstance(cause, TimeoutError) for cause in chain(error)):
            raise RunFailed(
                f'a save was not done in time for {safe}; the same command goes on. Either the file system hangs, or '
                'the clock jumped'
            ) from error
        raise


def _train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains a resolved config; see `train`."""
    use_compilation_cache()
    distributed.check_same('config', config.to_json())
    # Everything a config can get wrong shows here, before anything is written.
    with distributed.together():
        run, iterator = _opened(config, workdir)
    first = distributed.is_first()
    with ExitStack() as stack:
        resumed = stack.enter_context(start.claim(workdir, run))
        if resumed:
            start.keep_origin(config, files.read_config(workdir))
        else:
            config.fork = distributed.of_first(config.fork or '') or None
        if first:
            files.keep_config(workdir, config)
            (workdir / files.DIVERGED).unlink(missing_ok=True)
        branch = run.stable_until if run.stable_until < run.total_steps else None
        saved = stack.enter_context(Checkpoints(workdir, config.checkpoint, keep_step=branch))
        try:
            with distributed.together():
                state, origin = start.first_state(run, saved, iterator)
        except UserError:
            if first and not resumed:
                # Else the next command would be taken for one that resumes, and could not correct this one.
                files.take_back(workdir)
            raise
        first_step = int(state.step)
        if first_step >= run.total_steps:
            final = _final_of_before(workdir, first_step)
            if final is not None:
                return final
        # The last step is saved before it is evaluated: a run killed in between evaluates again.
        kept = {'first_step': first_step, 'keep_evaluations': first_step < run.total_steps}
        writer = MetricsWriter(workdir, **kept) if first else MetricsReader(workdir, **kept)
        stack.callback(writer.close)
        stream = sys.stderr if first else stack.enter_context(open(os.devnull, 'w'))
        progress = Progress(run.total_steps, first_step, stream=stream)
        stack.callback(progress.close)
        over_data = start.steps_over_data(run)
        passes = {} if over_data is None else run.passes(over_data)
        progress.say(start.introduction(run, state.params, origin))
        if passes:
            progress.say(f'{over_data * run.tokens_per_step:,} tokens, {told(passes)}')
        for line in start.hints(run, iterator):
            progress.say(line)
        if first:
            start.write_tables(run, state.params, workdir)
        stop = stack.enter_context(Interruption(run.mesh))
        stack.enter_context(run.context())
        loop = _Loop(run, state, iterator, saved, writer, progress, stop, files.config_to_dict(config))
        loop.run_to(run.total_steps)
        return loop.finish(workdir, passes)


def _opened(config: ConfigDict, workdir: Path) -> tuple[Run, TrainBatches]:
    """Returns the run of a config and its batches; of a new run `config.fork` becomes the checkpoint that it means."""
    run = Run.from_config(config)
    run.check()
    if not (workdir / files.CONFIG).exists():
        if config.fork is not None:
            config.fork = str(start.pin_fork(run, Path(config.fork)))
        if config.init_from is not None:
            with_pretrained(None, run.abstract_params, Path(config.init_from), tokenizer=run.tokenizer)
    # A length in epochs is looked up in the data, which may be at fault.
    _ = run.total_steps
    iterator = run.objective.train_batches(
        config.data,
        tokenizer=run.tokenizer,
        seed=config.seed,
        rows=local_rows(meshes.batch_sharding(run.mesh), config.data.batch_size),
    )
    return run, iterator


def _final_of_before(workdir: Path, step: int) -> dict[str, Any] | None:
    """Returns, in every process, the result of a run that is at its end already, and says so; None if it has none."""
    final = json.loads(distributed.of_first(json.dumps(files.read_final(workdir))))
    if final is not None and distributed.is_first():
        print(f'finished at step {step}: {workdir / files.FINAL} has the result')
        for split in lowest.risen(files.read_metrics(workdir / files.METRICS)):
            print(split)
    return final


class _Loop:
    """The mutable part of a run. One step is always in flight: its metrics are read while the next one runs."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        iterator: TrainBatches,
        saved: Checkpoints,
        writer: MetricsWriter | MetricsReader,
        progress: Progress,
        stop: Interruption,
        config_tree: dict[str, Any],
    ):
        self.run, self.state = run, state
        self.iterator = iterator if jax.process_count() == 1 else Ahead(iterator)
        self.saved, self.writer, self.progress = saved, writer, progress
        self.stop, self.config_tree = stop, config_tree
        self.step = int(state.step)
        self.train_step = run.train_step()
        self.evaluators = [(evaluator, run.evaluated_every(evaluator)) for evaluator in run.evaluators()]
        self.batch_sharding = meshes.batch_sharding(run.mesh)
        self.in_flight: tuple[int, dict[str, jax.Array]] | None = None
        self.clock = Clock(self.step)
        self.last_metrics: dict[str, Any] = {}
        self.lowest = lowest.by_split(writer.kept)
        self.reported = {(row['step'], row['split']) for row in writer.kept if row['split'] != 'train'}

    def run_to(self, total_steps: int) -> None:
        save_every = self.run.save_every
        if 0 < self.step < total_steps:
            # A signal may have cut short the evaluation of the step that it saved.
            self.evaluate(self.due())
        self._load_ahead(total_steps, first=True)
        while self.step < total_steps:
            self.state, metrics = self.train_step(self.state, self.next_batch())
            self.step += 1
            self.settle()
            self._load_ahead(total_steps)
            self.stop.poll()
            self.in_flight = (self.step, metrics)
            due = self.due() if self.step < total_steps else []
            due_save = self.step % save_every == 0 or self.step in (self.run.stable_until, total_steps)
            if due or due_save or self.stop:
                # What the files say must never be older than a checkpoint, or a killed run would lose lines for good.
                self.settle()
                with self.clock.paused():
                    try:
                        self.evaluate(due)
                    except UserError as error:
                        raise self._saved_before(error) from error
                    if due_save or self.stop:
                        identity = self.run.data_identity
                        self.saved.save(self.step, self.state, self.iterator, config=self.config_tree, data=identity)
            if self.stop and self.step < total_steps:
                self._leave()

    def next_batch(self) -> dict[str, jax.Array]:
        """Returns the next global batch, of which this process has loaded its own rows."""
        rows, batch_size = self.iterator.rows, self.iterator.batch_size
        try:
            batch = next(self.iterator)
        except UserError as error:
            raise self._saved_before(error) from error
        return put_batch(batch, self.batch_sharding, rows=rows, batch_size=batch_size)

    def _load_ahead(self, total_steps: int, *, first: bool = False) -> None:
        """Loads the batches after the next where there are several processes; tells them if there is none."""
        if not isinstance(self.iterator, Ahead):
            return
        if not self.iterator.load(total_steps - self.step):
            self.stop.no_batch()
        if first:
            # Who has not even the next one must not be waited for.
            self._leave_without_batch(unless=self.iterator.loaded > 0 or self.step == total_steps)
            self.stop.poll()

    def _leave_without_batch(self, *, unless: bool = False) -> None:
        """Raises, in every process, what one of them says of the batch that it cannot load."""
        try:
            with distributed.together():
                if self.iterator.error is not None and not unless:
                    raise self.iterator.error
        except UserError as error:
            raise self._saved_before(error) from error

    def _saved_before(self, error: UserError) -> UserError:
        """Saves, because a document that cannot be taken ends the run; returns the error with the way on."""
        self.settle()
        if self.step == 0:
            return error
        self.saved.save(self.step, self.state, self.iterator, config=self.config_tree, data=self.run.data_identity)
        self.saved.wait()
        return UserError(f'{error}; saved at step {self.step}, where the same command goes on')

    def _leave(self) -> None:
        self.saved.wait()
        if self.stop.signum == NO_BATCH:
            self._leave_without_batch()
        name = signal.Signals(self.stop.signum).name
        raise Interrupted(self.stop.signum, f'{name}: saved at step {self.step}; the same command resumes')

    def settle(self) -> None:
        """Reads the metrics of the step in flight: checks them, logs them when due."""
        if self.in_flight is None:
            return
        step, on_device = self.in_flight
        self.in_flight = None
        metrics = jax.device_get(on_device)
        norms = metrics.pop('parameter_grad_norms')
        objective = self.run.objective
        names = ('loss', objective.targets, 'learning_rate', 'grad_norm', *objective.metrics)
        metrics = {name: float(metrics[name]) for name in names}
        if not (np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])):
            raise NotFinite(step, self._diagnose(step, metrics['loss'], norms))
        speed = self.clock.tick(step, self.run.tokens_per_step)
        self.progress.update(step, loss=metrics['loss'], tokens_per_second=speed['tokens_per_second'])
        if step % self.run.config.log.every_steps == 0 or step == self.run.total_steps:
            speed = self.clock.window(step, self.run.tokens_per_step)
            rate = speed['tokens_per_second']
            mfu = self.run.mfu(rate) if rate else None
            self.last_metrics = metrics
            self.writer.write(step, 'train', {**metrics, **speed, 'mfu': mfu})

    def due(self) -> list[Evaluator]:
        """Returns the evaluators whose turn it is at this step."""
        return [evaluator for evaluator, every in self.evaluators if self.step % every == 0]

    def evaluate(self, evaluators: Sequence[Evaluator], *, final: bool = False) -> dict[Evaluator, dict[Case, Metrics]]:
        """Evaluates every split at the run's context, and at the end at the others too; a signal cuts it short.

        What metrics.jsonl has of this step already is not evaluated again.
        """
        measured = {evaluator: {} for evaluator in evaluators}
        for evaluator in evaluators:
            for case in evaluator.cases((self.run.config.data.context, *(evaluator.entry.contexts if final else ()))):
                name = f'{evaluator.name}/{case.name}'
                if (self.step, name) in self.reported:
                    continue
                try:
                    metrics = dict(evaluator.measure(self.state.params, case, cancelled=self.stop.poll))
                except Cancelled:
                    return measured
                self._report(name, metrics, evaluator.headline)
                measured[evaluator][case] = metrics
        return measured

    def finish(self, workdir: Path, passes: Mapping[str, Passes]) -> dict[str, Any]:
        """Evaluates the last state at every context, and writes final.json, with these passes, and the plots."""
        self.settle()
        measured = self.evaluate([evaluator for evaluator, _ in self.evaluators], final=True)
        if self.stop:
            self._leave()
        self.saved.wait()
        rows = files.read_metrics(workdir / files.METRICS)
        final = {
            'step': self.step,
            'parameters': count_parameters(self.state.params),
            'train': self.last_metrics or next((row for row in rows[::-1] if row['split'] == 'train'), {}),
            'eval': {
                # Those of the evaluator `eval` are named by the split alone.
                f'{evaluator.name}/{case.name}'.removeprefix('eval/'): _scalars(metrics)
                for evaluator, cases in measured.items()
                for case, metrics in cases.items()
            },
            'flops_per_token': self.run.flops_per_token,
            'device': self.run.devices,
            'data': self.run.data_identity,
            'passes': {source: each._asdict() for source, each in passes.items()},
            'versions': library_versions(),
        }
        if distributed.is_first():
            title = f'{self.run.config.model.name} ({self.run.config.model.size}) on {self.run.config.data.source}'
            plots.plot_loss(rows, workdir / 'plots' / 'loss.png', title=title)
            for evaluator, cases in measured.items():
                if evaluator.figure and cases:
                    evaluator.draw(cases, workdir / 'plots' / f'{evaluator.figure_name}.png', title=title)
            files.write_json(workdir / files.FINAL, final)
        saves = {'kept': self.saved.steps(), 'save_every': self.run.save_every}
        for split in lowest.risen(rows):
            self.progress.say(f'{split}: {lowest.advice(split, passes, **saves)}')
        return final

    def _report(self, name: str, metrics: Metrics, headline: Sequence[str]) -> None:
        self.reported.add((self.step, name))
        self.writer.write(self.step, name, _scalars(metrics))
        values = {metric.replace('_', ' '): metrics.get(metric) for metric in headline}
        said = [f'{metric} {value:.4f}' for metric, value in values.items() if value is not None]
        loss, before = metrics.get('loss'), self.lowest.get(name)
        if loss is not None:
            if before is not None and lowest.is_worse(loss, before.loss):
                said.append(f'lowest {before.loss:.4f} at step {before.step}')
            self.lowest[name] = lowest.with_loss(before, loss, self.step)
        if said:
            self.progress.say(f'step {self.step}  {name}  {", ".join(said)}')

    def _diagnose(self, step: int, loss: float, norms: np.ndarray) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
        names = [meshes.path_name(path) for path, _ in leaves]
        broken = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
        shown = ', '.join(broken[:5]) + (f' and {len(broken) - 5} more' if len(broken) > 5 else '')
        self.saved.wait()
        good = self.saved.steps()
        directory = self.saved.directory
        fork = f'step {good[-1]} in {directory}, which --fork={directory.parent} starts from' if good else 'none'
        return (
            f'loss {loss} at step {step} is not finite or its gradient is not; '
            f'parameters with non-finite gradients: {shown or "none"}; last good checkpoint: {fork}; '
            'try a lower optimizer.learning_rate or a longer optimizer.warmup_steps in another --workdir'
        )


def _scalars(metrics: Metrics) -> Metrics:
    return {metric: value for metric, value in metrics.items() if is_scalar(value)}
