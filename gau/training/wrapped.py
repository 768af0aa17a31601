"""An objective whose loss is computed in another way, as training sees it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gau.objectives.objective import Objective


@dataclass(frozen=True)
class Wrapped:
    """What stays as it is of an objective that a subclass computes the loss of.

    Attributes:
      objective: the one inside.
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
