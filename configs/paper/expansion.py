"""The expansion E / D of a gated unit from 1 to 3, at equal layers and at equal parameters, and against the chunk.

    python scripts/reproduce.py expansion --budget=small

Question: is E = 2D worth its parameters, or are more layers of E = D as good? The paper uses 2. `equal_parameters`
changes the number of layers so that the units together have the parameters that they have at E = 2D. `chunk_128` adds
the two points that set E = D against E = 2D at C = 128 as well as at 256.

Arguments: see configs/paper/budgets.py. Results: docs/results/expansion.md, four points of
nine so far: at equal layers E = D is 0.12 worse.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table
from gau.models.config import resolve

TABLES = {
    'expansion': Table(
        'Expansion of a gated unit',
        {
            'small': 'expansion+equal_parameters:small+chunk_128,seed:3',
            'tiny': 'expansion+equal_parameters:tiny,seed:2',
            'paper': 'expansion+equal_parameters:paper+chunk_128,seed:3',
        },
        {
            'by': 'model.expansion_factor,model.num_layers,model.chunk_size',
            # Rows of other numbers of layers are compared with E = 2D, too, which has their parameters.
            'against': {
                'tiny': 'model.expansion_factor=2.0,model.num_layers=4',
                'small': 'model.expansion_factor=2.0,model.num_layers=12',
                'paper': 'model.expansion_factor=2.0,model.num_layers=24',
            },
        },
    )
}
FACTORS = (1.0, 1.5, 2.0, 3.0)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/expansion.py:arg`."""
    return budgets.get_config(arg)


def sweep_expansion(*factors: float) -> Iterator[Overrides]:
    """E / D at equal layers."""
    for factor in factors or FACTORS:
        yield {'model.expansion_factor': factor}


def sweep_equal_parameters(budget: str = 'small') -> Iterator[Overrides]:
    """E / D at as many layers as make up for the parameters; 2 is a point of `expansion` already."""
    config = get_config(f'budget={budget}')
    model = resolve(config.model, causal=True, context=config.data.context)
    d, s = model.model_dim, model.query_key_dim
    unit = {factor: 3 * factor * d * d + d * s for factor in FACTORS}
    for factor in FACTORS:
        layers = round(model.num_layers * unit[2.0] / unit[factor])
        if factor != 2.0 and layers != model.num_layers:
            yield {'model.expansion_factor': factor, 'model.num_layers': layers}


def sweep_chunk_128() -> Iterator[Overrides]:
    """E = D and E = 2D at half the chunk."""
    for factor in (1.0, 2.0):
        yield {'model.expansion_factor': factor, 'model.chunk_size': 128}
