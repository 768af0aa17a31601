"""The training loop: resume, step, log, evaluate, save, stop."""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gau.data import pipeline
from gau.errors import UserError
from gau.training import mesh as meshes
from gau.training import workdir as files
from gau.training.checkpoints import Checkpoints, count_parameters
from gau.training.config import differences, library_versions, resolve
from gau.training.evaluation import Result, put_batch
from gau.training.metrics import MetricsWriter, Progress
from gau.training.plots import plot_loss, plot_loss_by_position
from gau.training.setup import Run, use_compilation_cache
from gau.training.step import TrainState


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state has been saved. `exit_code` is what the shell expects of it."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class NotFinite(Exception):
    """The loss or a gradient became NaN or infinite."""


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains the config's model in `workdir`, resuming what is there; returns what final.json says.

    The run starts from the first that exists: its own newest readable checkpoint; the newest one of the work
    directory `config.fork`; freshly drawn parameters.

    Raises:
      UserError: config, data or work directory are unusable.
      Interrupted: a signal asked to stop, and the state is saved.
      NotFinite: the loss diverged; the message names step, culprits and the last good checkpoint.
    """
    config = resolve(config)
    workdir = Path(workdir)
    use_compilation_cache()
    run = Run.from_config(config)
    # Everything a config can get wrong shows here, before anything is written.
    run.check()
    if config.fork is not None and not (workdir / files.CONFIG).exists():
        config.fork = str(_pin_fork(run, Path(config.fork)))
    total_steps = run.total_steps
    iterator = pipeline.train_iterator(
        config.data,
        objective=config.objective,
        tokenizer=run.tokenizer,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with ExitStack() as stack:
        if stack.enter_context(files.claim(workdir, config)):
            # Where a run came from is settled when it begins.
            config.fork = files.read_config(workdir).fork
        else:
            files.write_json(workdir / files.CONFIG, files.config_to_dict(config))
        config_tree = files.config_to_dict(config)
        saved = Checkpoints(workdir, config.checkpoint)
        stack.callback(saved.close)
        state, origin = _start(run, saved, iterator)
        first_step = int(state.step)
        final_path = workdir / files.FINAL
        if first_step >= total_steps and final_path.is_file():
            print(f'finished at step {first_step}: {final_path} has the result')
            return files.read_json(final_path)
        files.write_text(workdir / files.PARAMETERS, run.parameter_table(state.params))
        # The last step is saved before it is evaluated: a run killed in between evaluates again.
        writer = MetricsWriter(workdir, first_step=first_step, keep_evaluations=first_step < total_steps)
        stack.callback(writer.close)
        progress = Progress(total_steps, first_step)
        stack.callback(progress.close)
        progress.say(
            f'{config.model.name} ({config.model.size}), {count_parameters(state.params):,} parameters, '
            f'{run.devices}, attention: {run.model.config.impl}, {origin}'
        )
        stop = stack.enter_context(_signals())
        stack.enter_context(run.context())
        loop = _Loop(run, state, iterator, saved, writer, progress, stop, config_tree)
        loop.run_to(total_steps)
        return loop.finish(workdir)


def _start(run: Run, saved: Checkpoints, iterator: Any) -> tuple[TrainState, str]:
    """Returns the first state and where it came from; sets the iterator to the same place."""
    state = saved.restore(run.abstract_state, iterator=iterator)
    if state is not None:
        _warn_of_changes(saved.meta(int(state.step)), run)
        return state, f'resumed at step {int(state.step)}'
    if run.config.fork is None:
        return run.init_state(), 'new run'
    checkpoint = Path(run.config.fork)
    parent_workdir, step = checkpoint.parent.parent, int(checkpoint.name)
    changed = differences(files.config_to_dict(files.read_config(parent_workdir)), files.config_to_dict(run.config))
    # The iterator's position means something only in the same data in the same order.
    same_data = not any(path.startswith(('data.', 'seed:', 'objective:')) for path in changed)
    parent = Checkpoints(parent_workdir)
    try:
        state = parent.restore(run.abstract_state, step=step, iterator=iterator if same_data else None)
    finally:
        parent.close()
    # At once a checkpoint of its own: the parent may go on and drop the one that this run stands on.
    saved.save(step, state, iterator, config=files.config_to_dict(run.config), data=run.data_identity)
    return state, f'forked from {checkpoint}' + ('' if same_data else ', data from their start')


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


def _pin_fork(run: Run, fork: Path) -> Path:
    """Returns the checkpoint that a new run starts from: the newest of the work directory `fork`, or `fork` itself.

    Raises:
      UserError: there is none, it is of another architecture, or at or beyond the end of the new run.
    """
    is_checkpoint = fork.parent.name == 'checkpoints' and fork.name.isdecimal()
    workdir = fork.parent.parent if is_checkpoint else fork
    files.read_config(workdir)
    parent = Checkpoints(workdir)
    try:
        steps = parent.steps()
        step = int(fork.name) if is_checkpoint else max(steps, default=None)
        if step not in steps:
            raise UserError(f'fork={fork}: no such checkpoint, {workdir} has {steps or "none"}')
        parent.check_architecture(run.abstract_params, step)
    finally:
        parent.close()
    if step >= run.total_steps:
        raise UserError(
            f'fork={fork} is at step {step} already and this run ends at {run.total_steps}: give more steps'
        )
    return workdir / 'checkpoints' / str(step)


class _Loop:
    """The mutable part of a run. One step is always in flight: its metrics are read while the next one runs."""

    def __init__(
        self,
        run: Run,
        state: TrainState,
        iterator: Any,
        saved: Checkpoints,
        writer: MetricsWriter,
        progress: Progress,
        stop: list[int],
        config_tree: dict[str, Any],
    ):
        self.run, self.state, self.iterator = run, state, iterator
        self.saved, self.writer, self.progress = saved, writer, progress
        self.stop, self.config_tree = stop, config_tree
        self.step = int(state.step)
        self.train_step = run.train_step()
        self.evaluator = run.evaluator()
        self.batch_sharding = meshes.batch_sharding(run.mesh)
        self.in_flight: tuple[int, dict[str, jax.Array]] | None = None
        self.clock = _Clock(self.step)
        self.last_metrics: dict[str, Any] = {}
        self.reported = {
            (row['step'], row['split'].removeprefix('eval/')) for row in writer.kept if row['split'].startswith('eval/')
        }

    def run_to(self, total_steps: int) -> None:
        save_every = max(self.run.steps('checkpoint', 'every_'), 1)
        eval_every = max(self.run.steps('eval', 'every_'), 1)
        if 0 < self.step < total_steps and self.step % eval_every == 0:
            # A signal may have cut short the evaluation of the step that it saved.
            self.evaluate()
        while self.step < total_steps:
            batch = put_batch(next(self.iterator), self.batch_sharding)
            self.state, metrics = self.train_step(self.state, batch)
            self.step += 1
            self.settle()
            self.in_flight = (self.step, metrics)
            due_eval = self.step % eval_every == 0 and self.step < total_steps
            due_save = self.step % save_every == 0 or self.step == total_steps
            if due_eval or due_save or self.stop:
                # What the files say must never be older than a checkpoint, or a killed run would lose lines for good.
                self.settle()
                with self.clock.paused():
                    if due_eval:
                        self.evaluate()
                    if due_save or self.stop:
                        identity = self.run.data_identity
                        self.saved.save(self.step, self.state, self.iterator, config=self.config_tree, data=identity)
            if self.stop and self.step < total_steps:
                self._leave()

    def _leave(self) -> None:
        self.saved.wait()
        name = signal.Signals(self.stop[0]).name
        raise Interrupted(self.stop[0], f'{name}: saved at step {self.step}; the same command resumes')

    def settle(self) -> None:
        """Reads the metrics of the step in flight: checks them, logs them when due."""
        if self.in_flight is None:
            return
        step, on_device = self.in_flight
        self.in_flight = None
        metrics = jax.device_get(on_device)
        norms = metrics.pop('parameter_grad_norms')
        names = ('loss', 'tokens', 'learning_rate', 'grad_norm')
        metrics = {name: float(metrics[name]) for name in names}
        if not (np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])):
            raise NotFinite(self._diagnose(step, metrics['loss'], norms))
        speed = self.clock.tick(step, self.run.tokens_per_step)
        self.progress.update(step, loss=metrics['loss'], tokens_per_second=speed['tokens_per_second'])
        if step % self.run.config.log.every_steps == 0 or step == self.run.total_steps:
            speed = self.clock.window(step, self.run.tokens_per_step)
            rate = speed['tokens_per_second']
            mfu = self.run.mfu(rate) if rate else None
            self.last_metrics = metrics
            self.writer.write(step, 'train', {**metrics, **speed, 'mfu': mfu})

    def evaluate(self, contexts: Sequence[int] = ()) -> list[Result]:
        """Evaluates every configured split at the config's context and the given ones; a signal cuts it short.

        What metrics.jsonl has of this step already is not evaluated again.
        """
        results = []
        for context in (self.run.config.data.context, *contexts):
            for split in self.run.config.eval.splits:
                if (self.step, _eval_name(split, context, self.run.config)) in self.reported:
                    continue
                result = self.evaluator(
                    self.state.params, split=split, context=context, cancelled=lambda: bool(self.stop)
                )
                if result is None:
                    return results
                self._report(result)
                results.append(result)
        return results

    def finish(self, workdir: Path) -> dict[str, Any]:
        """Evaluates the last state at every context, and writes final.json and the plots."""
        self.settle()
        results = self.evaluate(self.run.config.eval.contexts)
        if self.stop:
            self._leave()
        self.saved.wait()
        rows = files.read_metrics(workdir / files.METRICS)
        title = f'{self.run.config.model.name} ({self.run.config.model.size}) on {self.run.config.data.source}'
        plot_loss(rows, workdir / 'plots' / 'loss.png', title=title)
        plot_loss_by_position(results, workdir / 'plots' / 'loss_by_position.png', title=title)
        final = {
            'step': self.step,
            'parameters': count_parameters(self.state.params),
            'train': self.last_metrics or next((row for row in rows[::-1] if row['split'] == 'train'), {}),
            'eval': {_eval_name(result.split, result.context, self.run.config): result.metrics() for result in results},
            'flops_per_token': self.run.flops_per_token,
            'device': self.run.devices,
            'versions': library_versions(),
        }
        files.write_json(workdir / files.FINAL, final)
        return final

    def _report(self, result: Result) -> None:
        metrics = result.metrics()
        name = _eval_name(result.split, result.context, self.run.config)
        self.reported.add((self.step, name))
        self.writer.write(self.step, f'eval/{name}', metrics)
        if metrics['loss'] is not None:
            bits = f', {metrics["bits_per_byte"]:.4f} bits per byte' if metrics['bits_per_byte'] is not None else ''
            self.progress.say(f'step {self.step}  eval/{name}  loss {metrics["loss"]:.4f}{bits}')

    def _diagnose(self, step: int, loss: float, norms: np.ndarray) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
        names = [meshes.path_name(path) for path, _ in leaves]
        broken = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
        shown = ', '.join(broken[:5]) + (f' and {len(broken) - 5} more' if len(broken) > 5 else '')
        self.saved.wait()
        good = self.saved.steps()
        return (
            f'loss {loss} at step {step} is not finite or its gradient is not; '
            f'parameters with non-finite gradients: {shown or "none"}; '
            f'last good checkpoint: {f"step {good[-1]} in {self.saved.directory}" if good else "none"}'
        )


def _eval_name(split: str, context: int, config: ConfigDict) -> str:
    return split if context == config.data.context else f'{split}_{context}'


class _Clock:
    """Seconds a step, over the steps since the last log line, without the time spent in evaluation and saving."""

    def __init__(self, step: int):
        self._start = self._last = (step, None)
        self._pause = 0.0
        self._recent: dict[str, float | None] = {'tokens_per_second': None, 'step_seconds': None}

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._pause += time.monotonic() - began

    def tick(self, step: int, tokens_per_step: int) -> dict[str, float | None]:
        """Marks a finished step; returns the speed since the window began."""
        now = time.monotonic() - self._pause
        if self._start[1] is None:
            # The first step compiles; the window begins at its end.
            self._start = (step, now)
        self._last = (step, now)
        steps = self._last[0] - self._start[0]
        if steps:
            seconds = (self._last[1] - self._start[1]) / steps
            self._recent = {'tokens_per_second': tokens_per_step / seconds, 'step_seconds': seconds}
        return self._recent

    def window(self, step: int, tokens_per_step: int) -> dict[str, float | None]:
        """Returns the speed of the window and begins the next one."""
        self._start = self._last
        return self._recent


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in the list it yields; a second SIGINT interrupts at once."""
    received: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
