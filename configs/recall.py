"""Associative recall: how many pairs a state, a window and exact attention find again, and how far back.

    python train.py --config=configs/recall.py:model=flash,pairs=64 --workdir=runs/recall
    python scripts/reproduce.py recall --budget=small --per_device=9        # 128 pairs; recall_16 and recall_64: fewer
    python scripts/reproduce.py recall_255 --budget=small --per_device=5    # more pairs than a state has columns
    python scripts/reproduce.py far_recall --budget=small --per_device=5    # 511 pairs

Question: FLASH keeps two chunks and a state of S x E numbers a layer, Transformer++ every key and value. On text the
loss is the same (docs/results/quality_shifted.md). What can FLASH not do? Here only exact memory counts. A row begins
with P pairs of a key and a value; then every key comes once more, and the model has to give its value
(gau/objectives/recall.py). `accuracy_by_distance` in eval.jsonl separates what lies within a window from what does not.

Arguments: model, size, context, pairs, runlocal. Sweeps:
  models   FLASH as configs/lm.py gives it (`best`), with shifted keys alone (`shifted`), and the paper's (`unit`);
           FLASH-Quad with shared and with shifted keys; Transformer++, and the same with a convolution over two tokens
  pairs    16, 64 and 128 of them
  many     more pairs than a state has columns, in rows of 2,048 tokens

Recipe: 2,000 steps of 64 rows of 512 tokens, Muon at 4e-3 after 100 steps of warm-up, no sinusoid, 512 values. Chance
is 1 in 512. Always naming the row's most frequent value is right for 0.075 of the queries at 16 pairs, 0.033 at 64 and
0.021 at 128, since values repeat (docs/results/recall.md).

Shifted keys and the convolution put the token before into a key, so that one layer can look a pair up. A model without
them has to learn first, in two layers, which token stood before a value. That takes many more steps than the look-up,
and a run can end before it; so `models` has both kinds. On a CPU (rows of 32 tokens with 8 pairs, 64 wide, a vocabulary
of 256, one seed) FLASH of `best` with chunks of 8 finds 0.57 of the values after 200 steps and 0.96 after 400,
Transformer++ with the convolution 0.98 after 400, and Transformer++ 0.15 after 1,400, a guess among the row's values
(L61).

Result (docs/results/recall.md, n = 2): with shifted keys or the convolution nearly all of 128 pairs are found: 1.000 by
exact attention, 0.998 by `best`, and 0.998 by `shifted`, which has nothing but its states for them. `unit`, `quad` and
Transformer++ have not found the task after 2,000 steps: they guess among the row's values. `many`
(n = 1): of 255 pairs exact attention and far chunks find all, a state of 128 columns 0.955, with a gate 0.418 and with
a window beside it 0.529. Of 511 (docs/results/far_memory.md) chunks read exactly find 0.631; the other four have not
found the task.

`:runlocal` asks for 8 pairs in rows of 128 tokens for 20 steps, and shows that everything works; `best` needs
`:runlocal,context=512`, several chunks of 128.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common
from gau.experiments.sweep import Overrides
from gau.experiments.table import Evaluation, Table
from gau.training import config as training_config

TABLES = {
    **{
        name: Table(
            f'Associative recall, {pairs} pairs in rows of 512 tokens',
            {'small': f':pairs:{pairs},models,seed:2', 'tiny': f':pairs:{pairs},models,seed:1'},
            {'by': 'point', 'metric': 'accuracy', 'against': f'pairs_{pairs}-quad_shifted'},
            words={'small': '', 'tiny': 'context=512,runlocal'},
        )
        for name, pairs in (('recall', 128), ('recall_16', 16), ('recall_64', 64))
    },
    'recall_255': Table(
        'Associative recall, 255 pairs in rows of 1,024 tokens',
        {'small': 'many,seed:2', 'tiny': 'many,seed:1'},
        {'by': 'point', 'metric': 'accuracy', 'against': 'shifted'},
        words={'small': 'pairs=255,context=1024', 'tiny': 'pairs=64,context=512,runlocal'},
        fields={'small': {'data.batch_size': 32, 'steps': 3000, 'checkpoint.every_steps': 3000}},
        evaluations=[Evaluation({'evaluators': 'eval'})],  # accuracy by distance
    ),
    'far_recall': Table(
        'Associative recall of pairs that lie in several chunks',
        {'small': 'many,seed:2', 'tiny': 'many,seed:1'},
        {'by': 'point', 'metric': 'accuracy', 'against': 'shifted_gate'},
        words={'small': 'pairs=511,context=2048', 'tiny': 'pairs=127,context=512,runlocal'},
        fields={'small': {'data.batch_size': 16}},
        evaluations=[Evaluation({'evaluators': 'eval'})],  # accuracy by distance
    ),
}
TRANSFORMER = {':model': 'transformer_plus_plus'}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/recall.py:arg`."""
    arg = common.parse_arg(arg, model='flash', size='tiny', context=512, pairs=64)
    config = training_config.default_config()
    config.objective = 'recall'
    config.model.name = arg.model
    config.model.size = arg.size
    config.model.absolute_position = 'none'
    config.data.source = f'pairs:{arg.pairs}'
    config.data.context = arg.context
    config.data.batch_size = 64
    config.steps = 2000
    config.optimizer.name = 'muon'
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.98
    config.checkpoint.every_steps = 1000
    config.eval.every_steps = 250
    config.eval.max_tokens = 32_768
    config.log.every_steps = 50
    if arg.runlocal:
        common.run_local(config, (*arg.given, 'data'))
        if 'pairs' not in arg.given:
            config.data.source = 'pairs:8'
    return config


def sweep_models() -> Iterator[Overrides]:
    """What may remember the pairs."""
    best = {f'model.{field}': value for field, value in common.BEST_FLASH.items()}
    shifted = {'model.key_input': 'shifted'}
    yield {'name': 'best', ':model': 'flash', **best}
    yield {'name': 'shifted', ':model': 'flash', **shifted}
    yield {'name': 'unit', ':model': 'flash'}
    yield {'name': 'quad_shifted', ':model': 'flash_quad', **shifted}
    yield {'name': 'quad', ':model': 'flash_quad'}
    yield {'name': 'transformer_plus_plus_convolution', **TRANSFORMER, 'model.short_convolution': 2}
    yield {'name': 'transformer_plus_plus', **TRANSFORMER}


def sweep_many() -> Iterator[Overrides]:
    """States, windows, earlier chunks read exactly, and every token: all with shifted keys."""
    models = {point['name']: point for point in sweep_models()}
    yield from (models[name] for name in ('best', 'shifted', 'quad_shifted'))
    yield {**models['shifted'], 'name': 'shifted_gate', 'model.decay_gate': 'scalar'}
    yield {**models['shifted'], 'name': 'shifted_far_4', 'model.far_chunks': 4}


def sweep_pairs() -> Iterator[Overrides]:
    """16 pairs lie within a chunk of 128 tokens, 64 fill one, 128 one of 256, which leaves all to its state."""
    for pairs in (16, 64, 128):
        yield {':pairs': pairs}
