"""What going from quadratic to mixed chunk attention costs the gated unit, and what it costs the Transformer.

    python scripts/reproduce.py mixed_chunk --budget=small

Question: is it the gate that lets attention be chunked? The paper says that FLASH loses little against FLASH-Quad where
MC-TFM++ loses much against Transformer++. Each family has its own baseline in the table. Above a context of 512
FLASH-Quad's relative bias is rotary and FLASH's a table; causal FLASH-Quad divides by a fixed 512, FLASH by its chunk.

Arguments: see configs/paper/budgets.py. Results: docs/results/mixed_chunk.md. FLASH loses nothing against FLASH-Quad
(3.658 against 3.711; with softmax FLASH-Quad has 3.588), MC-TFM++ loses (3.831 against 3.677; 3.776 at Transformer++'s
rate, one seed). With the paper's start of the bias one seed each had 3.866 (FLASH-Quad), 3.776 (FLASH), 3.646
(Transformer++), 3.754 (MC-TFM++).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'mixed_chunk': Table(
        'Quadratic against mixed chunk attention',
        {'small': 'models,seed:3', 'tiny': 'models,seed:2'},
        {'by': 'family,attention', 'against': 'attention=quadratic'},
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/mixed_chunk.py:arg`."""
    return budgets.get_config(arg)


def sweep_models() -> Iterator[Overrides]:
    """Both families, quadratic and chunked."""
    for model in ('flash_quad', 'flash', 'transformer_plus_plus', 'mc_transformer_plus_plus'):
        yield {':model': model}
