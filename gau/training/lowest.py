"""Whether a run ends above the lowest held-out loss that it had, from the lines of its metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Nats a target. The targets are the same at every evaluation, so what is left of chance is that of training, whose
# learning rate falls to the end: of 369 held-out curves in docs/results ten end above their lowest point at all, and
# these by 0.09 to 0.64 (fine-tuning, authors.md; 6.5 passes over the text, quality_base_8192.md).
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


def risen(rows: Iterable[Mapping[str, Any]]) -> list[Risen]:
    """Returns the evaluated splits whose last loss is above their lowest one by WORSE or more, in the rows' order.

    Args:
      rows: of metrics.jsonl: `step`, `split`, and `loss` where there is one.
    """
    losses: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        loss = row.get('loss')
        if row['split'] != 'train' and loss is not None and math.isfinite(loss):
            losses.setdefault(row['split'].removeprefix('eval/'), []).append((loss, row['step']))
    found = []
    for split, own in losses.items():
        lowest, step = min(own)
        last = max(own, key=lambda each: each[1])[0]
        if is_worse(last, lowest):
            found.append(Risen(split, step, lowest, last))
    return found


def is_worse(loss: float, lowest: float) -> bool:
    """Returns whether a loss is above the lowest one by more than chance."""
    return loss - lowest >= WORSE
