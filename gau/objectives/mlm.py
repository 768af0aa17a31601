"""Masked language modelling: the hidden tokens from all the others."""

from gau.objectives.text import TextObjective


class MLM(TextObjective):
    """Prediction of masked tokens, for bidirectional models; how they are masked: `config.data.mlm`."""

    causal = False
    rows = 'mlm'
