"""Classification by causal models, whose last token alone has seen the whole text."""

from gau.objectives.classification import Classification


class CausalClassification(Classification):
    """As `Classification`, for language models."""

    causal = True
