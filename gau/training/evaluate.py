"""Evaluation of a work directory: any checkpoint, split and context length, with the evaluator that training uses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.implementations import Target, why_not
from gau.training import distributed
from gau.training import workdir as files
from gau.training.checkpoints import Checkpoints
from gau.training.config import resolve
from gau.training.evaluation import Result
from gau.training.plots import plot_loss_by_position
from gau.training.setup import Run, use_compilation_cache
from gau.training.stream import StreamEvaluator


def load_run(workdir: str | Path, *, step: int | None = None) -> tuple[Run, Any, int]:
    """Opens a work directory for reading.

    Args:
      workdir: directory of a run.
      step: checkpoint to load; None means the newest.

    Returns:
      The run, the checkpoint's parameters and its step.

    Raises:
      UserError: no run there, no such checkpoint, or a damaged one.
    """
    workdir = Path(workdir)
    config = files.read_config(workdir)
    # Whatever mesh trained it, the parameters are divided over the devices at hand.
    config.mesh = ConfigDict({'data': 1, 'fsdp': -1, 'tensor': 1, 'sequence': 1})
    use_compilation_cache()
    config = resolve(config)
    # Nor is it a reason not to read that the chosen implementation is not for the chip at hand.
    if config.model.impl != 'auto' and why_not(config.model.impl, config.model, Target.of_device(jax.devices()[0])):
        config.model.impl = 'auto'
    run = Run.from_config(config)
    saved = Checkpoints(workdir)
    try:
        steps = saved.steps()
    finally:
        saved.close()
    if not steps:
        raise UserError(f'{saved.directory} has no checkpoint yet')
    if step is not None and step not in steps:
        raise UserError(f'{saved.directory} has no checkpoint of step {step}; it has {steps}')
    chosen = steps[-1] if step is None else step
    return run, saved.restore_params(run.abstract_params, step=chosen), chosen


def evaluate(
    workdir: str | Path,
    *,
    step: int | None = None,
    contexts: Sequence[int] | None = None,
    splits: Sequence[str] | None = None,
    max_tokens: int | None = None,
    stream: bool = False,
) -> list[Result]:
    """Evaluates a checkpoint, prints tables, appends to DIR/eval.jsonl and draws the loss by position.

    With several processes all of them call it, and the first prints and writes.

    Args:
      workdir: directory of a run.
      step: checkpoint to load; None means the newest.
      contexts: context lengths; None means the config's.
      splits: data splits; None means the config's `eval.splits`.
      max_tokens: tokens of each split to use; None means the config's.
      stream: whether to read whole texts with the state carried along (`gau.training.stream`): once to their ends, and
        once for each of `contexts`, after so many tokens of which the state is forgotten.

    Raises:
      UserError: see `load_run`; an unknown split; or `stream` and a model without a state of constant size, or more
        than one process.
    """
    workdir = Path(workdir)
    if stream and jax.process_count() > 1:
        raise UserError('--stream reads with one process: start it without others, or with --distributed=off')
    with distributed.together():
        run, params, step = load_run(workdir, step=step)
    # The table and the files are the first process's.
    say = print if distributed.is_first() else lambda *_: None
    if max_tokens is not None:
        run.config.eval.max_tokens = max_tokens
    evaluator = StreamEvaluator(run.config, run.model, run.tokenizer) if stream else run.evaluator()
    contexts = [*([None] if stream else []), *(contexts or [run.config.data.context])]
    results = []
    say(f'{workdir} at step {step}: {run.config.model.name} ({run.config.model.size}), {run.config.data.tokenizer}')
    say(f'{"split":10} {"context":>8} {"tokens":>12} {"loss":>9} {"perplexity":>11} {"bits/byte":>10}')
    with run.context():
        for split in splits or run.config.eval.splits:
            for context in contexts:
                result = evaluator(params, split=split, context=context)
                metrics = result.metrics()
                say(
                    f'{split:10} {context or "text":>8} {metrics["tokens"]:12,} {_number(metrics["loss"], 9)} '
                    f'{_number(metrics["perplexity"], 11)} {_number(metrics["bits_per_byte"], 10)}'
                )
                results.append(result)
    if not distributed.is_first():
        return results
    with (workdir / files.EVAL).open('a') as file:
        for result in results:
            by_position = [
                dict(zip(('first', 'last', 'loss', 'tokens'), row, strict=True)) for row in result.by_position()
            ]
            name = f'{"stream" if stream else "eval"}/{result.split}'
            row = {'step': step, 'split': name, **result.metrics(), 'loss_by_position': by_position}
            file.write(json.dumps(row) + '\n')
    _print_by_position(results)
    path = workdir / 'plots' / f'{"stream_" if stream else ""}loss_by_position_step_{step}.png'
    plot_loss_by_position(results, path, title=f'{workdir.name} at step {step}')
    print(f'written: {workdir / files.EVAL}, {path}')
    return results


def _number(value: float | None, width: int) -> str:
    return f'{value:{width}.4f}' if value is not None else f'{"-":>{width}}'


def _print_by_position(results: Sequence[Result]) -> None:
    print(f'\n{"loss at context":16}' + ''.join(f' {result.split[:6]:>6}@{result.context:<6}' for result in results))
    columns = [{(first, last): loss for first, last, loss, _ in result.by_position()} for result in results]
    for first, last in sorted({key for column in columns for key in column}):
        name = str(first) if first == last else f'{first}-{last}'
        print(f'{name:16}' + ''.join(f' {_number(column.get((first, last)), 13)}' for column in columns))
