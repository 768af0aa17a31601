"""Whether a run ends above the lowest held-out loss that it had, from the lines of its metrics.jsonl."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from gau.data.passes import Passes

# Nats a target. The targets are the same at every evaluation, so what is left of chance is that of training, whose
# learning rate falls to the end: of 369 held-out curves in docs/results ten end above their lowest point at all, and
# these by 0.09 to 0.64 (fine-tuning, authors.md; 6.4 passes over the text, quality_base_8192.md).
WORSE = 0.01


class Risen(NamedTuple):
    """A split whose loss was lower before.

    Attributes:
      split: as in final.json: `valid`, or EVALUATOR/SPLIT.
      step, lowest: when its loss was lowest, and how low.
      last: its loss at the last evaluation.
    """

    split: str
    step: int
    lowest: float
    last: float

    def __str__(self) -> str:
        """One clause, for the end of a run."""
        return (
            f'held-out loss ({self.split}) was lowest at step {self.step:,} ({self.lowest:.3f}) '
            f'and is {self.last:.3f} now'
        )


class Lowest(NamedTuple):
    """The lowest loss that a split had, and the first step that had it."""

    loss: float
    step: int


def with_loss(lowest: Lowest | None, loss: float, step: int) -> Lowest | None:
    """Returns the lowest loss when one more is known. One that is not finite is none."""
    if not math.isfinite(loss) or (lowest is not None and lowest.loss <= loss):
        return lowest
    return Lowest(loss, step)


def by_split(rows: Iterable[Mapping[str, Any]]) -> dict[str, Lowest]:
    """Returns the lowest loss of every evaluated split, by its name in metrics.jsonl, such as `eval/valid`.

    Args:
      rows: of metrics.jsonl: `step`, `split`, and `loss` where there is one.
    """
    found: dict[str, Lowest] = {}
    for row in rows:
        if row['split'] != 'train' and row.get('loss') is not None:
            least = with_loss(found.get(row['split']), row['loss'], row['step'])
            if least is not None:
                found[row['split']] = least
    return found


def risen(rows: Collection[Mapping[str, Any]]) -> list[Risen]:
    """Returns the evaluated splits whose last loss is above their lowest one by WORSE or more, in the rows' order.

    Args:
      rows: of metrics.jsonl: `step`, `split`, and `loss` where there is one.
    """
    last = {row['split']: row['loss'] for row in rows if row.get('loss') is not None and math.isfinite(row['loss'])}
    return [
        Risen(split.removeprefix('eval/'), lowest.step, lowest.loss, last[split])
        for split, lowest in by_split(rows).items()
        if is_worse(last[split], lowest.loss)
    ]


def advice(risen: Risen, passes: Mapping[str, Passes], *, kept: Collection[int], save_every: int) -> str:
    """Says why a loss may have risen, and where the best checkpoint is, or what would have kept it.

    Args:
      risen: what has risen.
      passes: of the run over its sources.
      kept: the steps that have a checkpoint.
      save_every: how many steps lie between two of them, before any is dropped.
    """
    again = [each.words for each in passes.values() if each.times > 1]
    why = f'after {" and ".join(again)} passes over the same text, more of them' if again else 'more steps'
    step = risen.step
    if step in kept:
        way = f'the checkpoint of step {step} is kept, for --step={step} of eval.py and sample.py'
    else:
        saves = '' if step % save_every == 0 else f'--config.checkpoint.every_steps={step} '
        way = f'a run with {saves}--config.checkpoint.keep_every={step} keeps the best checkpoint'
    return f'{why} no longer help; {way}'


def is_worse(loss: float, lowest: float) -> bool:
    """Returns whether a loss is above the lowest one by more than chance."""
    return loss - lowest >= WORSE
