"""What makes the gated attention unit work: each of its parts taken away, and given to the Transformer.

    python scripts/reproduce.py gau_ablation --budget=small

Question: is it relu^2, the single head or the gate that lets one unit stand for attention and feed-forward? The paper's
answer (perplexity at 512 tokens, LM / MLM, recalled): GAU 16.78 / 4.23, softmax 17.04 / 4.31, eight heads 17.76 / 4.48,
no gate 17.45 / 4.58; multi-head attention 16.87 / 4.35, with relu^2 17.15 / 4.77, one head 17.89 / 4.73, a gate 17.25 /
4.43. Without the gate the unit has fewer parameters; heads divide the same E. At 1,024 tokens, where the two baselines
are runs of docs/results/models.md, the unit's relative bias is rotary; `context=512` has the paper's table.

Arguments: see configs/paper/budgets.py. Results: docs/results/gau_ablation.md, six of nine rows so far: no gate is 0.23
worse, softmax 0.12 better.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'gau_ablation': Table(
        'Parts of the gated attention unit',
        {'small': 'gau+attention,seed:3', 'tiny': 'gau+attention,seed:2'},
        {
            # By fields and not by point: kept runs of other tables are rows of this one, too.
            'by': 'family,model.attention_function,model.num_heads,model.gate',
            'against': 'family=gated_unit,model.attention_function=relu2,model.num_heads=1,model.gate=silu',
        },
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/gau_ablation.py:arg`."""
    return budgets.get_config(arg, model='flash_quad')


def sweep_gau() -> Iterator[Overrides]:
    """The unit, and the unit with one part changed."""
    yield {'name': 'gau'}
    yield {'name': 'gau_softmax', 'model.attention_function': 'softmax'}
    yield {'name': 'gau_4_heads', 'model.num_heads': 4}
    yield {'name': 'gau_8_heads', 'model.num_heads': 8}
    yield {'name': 'gau_no_gate', 'model.gate': 'none'}


def sweep_attention() -> Iterator[Overrides]:
    """Multi-head attention with GEGLU, and what the unit has given to it one by one."""
    attention = {':model': 'transformer_plus_plus'}
    yield {'name': 'attention', **attention}
    yield {'name': 'attention_relu2', **attention, 'model.attention_function': 'relu2'}
    yield {'name': 'attention_1_head', **attention, 'model.num_heads': 1}
    yield {'name': 'attention_gate', **attention, 'model.gate': 'silu'}
