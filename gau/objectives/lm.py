"""Language modelling: every token from those before it."""

from gau.objectives.text import TextObjective


class LM(TextObjective):
    """Next-token prediction, for causal models."""

    causal = True
    rows = 'lm'
