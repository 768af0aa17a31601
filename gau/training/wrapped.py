"""An objective whose loss is computed in another way, as training sees it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gau.objectives.objective import Objective


@dataclass(frozen=True)
class Wrapped:
    """Base of classes that compute an objective's loss in another way; the rest is the objective's.

    Attributes:
      objective: the objective.
    """

    objective: Objective

    @property
    def targets(self) -> str:
        """As of the objective."""
        return self.objective.targets

    @property
    def metrics(self) -> Sequence[str]:
        """As of the objective."""
        return self.objective.metrics
