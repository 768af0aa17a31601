"""All models but Linformer, which cannot be causal, at equal tokens and equal size.

    python scripts/reproduce.py models --budget=small

Question: the paper's main table (Wiki-40B at 8,192, perplexity, recalled: FLASH 15.109, Transformer++ 15.254). FLASH
and Transformer++ have learning rates that were looked for, the others take one of these (configs/paper/budgets.py).
Sweep `contexts` sets the paper's five lengths beside each other.

Arguments: see configs/paper/budgets.py. Results: docs/results/models.md, four of them so far.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'models': Table(
        'Models as causal language models',
        {'small': 'models,seed:3', 'tiny': 'models,seed:2', 'paper': 'models,contexts,seed:3'},
        {'by': 'model.name,data.context', 'against': 'model.name=transformer_plus_plus'},
    )
}
MODELS = (
    'flash',
    'flash_quad',
    'transformer_plus_plus',
    'transformer_plus',
    'transformer',
    'mc_transformer_plus_plus',
    'performer',
    'combiner',
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/models.py:arg`."""
    return budgets.get_config(arg, objective='lm')


def sweep_models(*models: str) -> Iterator[Overrides]:
    """Models by name; by default all."""
    for model in models or MODELS:
        yield {':model': model}


def sweep_contexts(*contexts: int) -> Iterator[Overrides]:
    """Tokens in a sequence; by default the paper's."""
    for context in contexts or (512, 1024, 2048, 4096, 8192):
        yield {':context': context}
