"""What every evaluator is: a class that goes over splits of the data and yields (metric, value) pairs.

A new one is one file with a class as below, and an entry `config.evaluators.NAME = {'type': ..., ...}` where `type` is
the file's name here, or `module:Class` for a class anywhere else. Fields that an entry does not give are those of
`config.eval`. In metrics.jsonl and eval.jsonl its rows are named NAME/SPLIT.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gau.errors import UserError, did_you_mean
from gau.objectives.objective import Batch, Objective

Metrics = Mapping[str, Any]
# Keys of an evaluation batch that the model has no use for.
HOST_ONLY = ('target_bytes', 'target_words')


class Run(Protocol):
    """What an evaluator asks of a run (`gau.training.setup.Run`)."""

    config: ConfigDict
    objective: Objective
    tokenizer: Any
    mesh: Mesh
    model: Any
    abstract_params: Any

    def put_batch(self, batch: Batch) -> dict[str, jax.Array]:
        """Makes global arrays of a whole batch."""

    def check_batch(self, rows: int, context: int) -> None:
        """Raises UserError unless [rows, context] arrays divide over the mesh."""


class Case(NamedTuple):
    """One measurement: a split at a context length; `name` tells it from the evaluator's others."""

    name: str
    split: str
    context: int | None


class Cancelled(Exception):
    """A signal asked to stop during an evaluation."""


class Evaluator:
    """Measures parameters on splits of the data.

    Attributes:
      options: fields of its own that an entry may have, with their defaults.
      headline: metrics that training says aloud. columns: those that `table` has; none: all that are numbers.
      figure: file name of its figure, without suffix; None draws none.
    """

    options: ClassVar[Mapping[str, Any]] = {}
    headline: ClassVar[Sequence[str]] = ()
    columns: ClassVar[Sequence[str]] = ()
    figure: ClassVar[str | None] = None

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes the run, the entry's name, and the entry with what it leaves to `config.eval` filled in.

        Raises:
          UserError: a field that neither the evaluator nor `config.eval` has, or a run that it cannot measure.
        """
        known = {'type', *run.config.eval.keys(), *self.options}
        for field in entry:
            if field not in known:
                raise UserError(
                    f'evaluators.{name}.{field} is unknown to the evaluator {entry.type}{did_you_mean(field, known)}'
                )
        self.run, self.name = run, name
        self.entry = ConfigDict({**self.options, **entry})

    def check_range(self, field: str, least: int, most: int = 2**31 - 1) -> None:
        """Raises UserError unless the entry's field is a number from `least` to `most`."""
        value = self.entry[field]
        if not least <= value <= most:
            raise UserError(f'evaluators.{self.name}.{field}={value}: want {least} to {most}')

    @property
    def figure_name(self) -> str:
        """The figure's file name for this entry, without suffix: `figure` for the entry `eval`, else NAME_`figure`."""
        return self.figure if self.name == 'eval' else f'{self.name}_{self.figure}'

    def cases(self, contexts: Sequence[int]) -> list[Case]:
        """Returns what is measured: every split at every context.

        A case at the run's own context is named after its split, one at another context SPLIT_CONTEXT.
        """
        own = self.run.config.data.context
        return [
            Case(split if context == own else f'{split}_{context}', split, context)
            for context in dict.fromkeys(contexts)
            for split in self.entry.splits
        ]

    def check(self) -> None:
        """Finds what would go wrong only in the middle of a run.

        Raises:
          UserError: a split does not exist or has no text, or the model cannot be evaluated at a context.
        """
        for split in self.entry.splits:
            self.run.objective.check_split(self.run.config.data, split)

    def check_context(self, context: int) -> None:
        """Raises UserError if rows of `context` tokens are too short for what is measured."""

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields (metric, value): numbers, None for what is undefined, or what JSON can hold.

        Args:
          params: the model's parameters, unboxed.
          case: one of `cases`.
          cancelled: asked before every batch, in every process.

        Raises:
          UserError: the split cannot be read.
          Cancelled: `cancelled` said True.
        """
        raise NotImplementedError

    def draw(self, measured: Mapping[Case, Metrics], path: Path, *, title: str) -> None:
        """Draws `figure` into `path`, from the metrics of every case."""
        raise NotImplementedError

    def table(self, measured: Mapping[Case, Metrics]) -> str:
        """Returns the metrics of every case as text, a line each."""
        names = self.columns or [name for name, value in next(iter(measured.values())).items() if is_scalar(value)]
        titles = [name.replace('_', ' ') for name in names]
        widths = [max(len(title), 9) for title in titles]
        first = max(20, *(len(f'{self.name}/{case.name}') for case in measured))
        lines = [[f'{"":{first}}', *(f'{title:>{width}}' for title, width in zip(titles, widths, strict=True))]]
        for case, metrics in measured.items():
            cells = (f'{_text(metrics.get(name)):>{width}}' for name, width in zip(names, widths, strict=True))
            lines.append([f'{f"{self.name}/{case.name}":{first}}', *cells])
        return '\n'.join(' '.join(line) for line in lines)


def is_scalar(value: Any) -> bool:
    """Returns whether a metric's value stands in metrics.jsonl and final.json, too: a number or null."""
    return value is None or isinstance(value, int | float)


def _text(value: float | None) -> str:
    if value is None:
        return '-'
    return f'{value:,}' if isinstance(value, int) else f'{value:.4f}'


class BatchEvaluator(Evaluator):
    """An evaluator of the batches of a split: what the device computes for each is summed up on the host."""

    def outputs(self, params: Any, batch: Mapping[str, jax.Array]) -> Any:
        """Returns what the host is to see of a batch: arrays, or a tree of them. Traced, on the device."""
        raise NotImplementedError

    def arrays(self, context: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Returns (shape, dtype) of every array of a batch of one row of `context` tokens, without HOST_ONLY."""
        return self.run.objective.arrays(self.run.config.data, rows=1, context=context)

    def rows(self, case: Case, batch_size: int) -> Iterator[Batch]:
        """Returns one pass over what is measured in batches of one shape, the last filled up with rows of weight 0."""
        return self.run.objective.eval_batches(
            self.run.config.data,
            tokenizer=self.run.tokenizer,
            split=case.split,
            context=case.context,
            batch_size=batch_size,
            max_tokens=self.entry.max_tokens,
        )

    def batches(self, params: Any, case: Case, cancelled: Callable[[], bool]) -> Iterator[tuple[Batch, Any]]:
        """Yields every batch of the case with its outputs, on the host; the device works on the next one meanwhile.

        All batches are whole, the last one filled up with rows of weight 0. Every process sees all of them.

        Raises:
          Cancelled: `cancelled` said True.
        """
        batch_size = self._batch_size(case.context)
        self.run.check_batch(batch_size, case.context)
        in_flight = None
        for batch in self.rows(case, batch_size):
            if cancelled():
                raise Cancelled
            dispatched = self._outputs(params, self.run.put_batch(on_device(batch)))
            if in_flight is not None:
                yield in_flight[0], jax.tree.map(np.asarray, in_flight[1])
            in_flight = batch, dispatched
        if in_flight is not None:
            yield in_flight[0], jax.tree.map(np.asarray, in_flight[1])

    def check(self) -> None:
        """Traces the outputs at every context, beside what every evaluator checks."""
        super().check()
        config = self.run.config
        for context in {config.data.context, *self.entry.contexts}:
            self.check_context(context)
            self.run.check_batch(self._batch_size(context), context)
            if context != config.data.context:
                batch = {name: jax.ShapeDtypeStruct(*array) for name, array in self.arrays(context).items()}
                jax.eval_shape(self.outputs, self.run.abstract_params, batch)

    def _batch_size(self, context: int) -> int:
        """Rows a batch: at the run's context as many as a training step holds at once, elsewhere as many tokens."""
        config, mesh = self.run.config, self.run.mesh
        rows = self.entry.batch_size or config.data.batch_size // config.optimizer.accumulation_steps
        divisor = mesh.shape['data'] * mesh.shape['fsdp']
        return max(rows * config.data.context // context // divisor, 1) * divisor

    @cached_property
    def _outputs(self) -> Callable[[Any, Any], Any]:
        # Every process gets the outputs of all rows, and takes the same sums in the same order, however many there are.
        return jax.jit(self.outputs, out_shardings=NamedSharding(self.run.mesh, PartitionSpec()))


def on_device(batch: Batch) -> Batch:
    """Returns the part of an evaluation batch that the model has a use for."""
    return {key: x for key, x in batch.items() if key not in HOST_ONLY}
