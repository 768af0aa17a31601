"""Associative recall: how many pairs a state, a window and exact attention find again, and how far back.

    python train.py --config=configs/recall.py:model=flash,pairs=64 --workdir=runs/recall
    python scripts/sweep.py --config=configs/recall.py --sweep=models,pairs,seed:3 --workdir=runs/recalls --per_device=4
    python scripts/report.py runs/recalls --metric=accuracy --by=point --allow=data

Question: Transformer++ draws ahead of FLASH at 8,192 tokens (docs/results/quality_muon.md). Is it exact memory? Text
does not say, but here nothing else is asked: a row begins with pairs of a key and a value, and every key stands once
more behind them, where its value is to be told (gau/objectives/recall.py). Pairs within FLASH's chunk of 256 tokens are
its local branch's; those before it are the state's, S x E numbers a layer.

Arguments: model, size, context, pairs, runlocal. Sweeps: `models` (FLASH, with a gate, with a window of two chunks,
the local branch alone, FLASH-Quad, Transformer++), `pairs`.

Recipe: 4,000 steps of 64 rows of 1,024 tokens at most, Muon at 4e-3 after 200 steps of warm-up, no sinusoid.

Result: not run yet. `:runlocal` asks for 8 pairs in rows of 128 tokens for 20 steps, and shows that everything works.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common
from gau.experiments.sweep import Overrides
from gau.training import config as training_config


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/recall.py:arg`."""
    arg = common.parse_arg(arg, model='flash', size='tiny', context=1024, pairs=64)
    config = training_config.default_config()
    config.objective = 'recall'
    config.model.name = arg.model
    config.model.size = arg.size
    config.model.absolute_position = 'none'
    config.data.source = f'pairs:{arg.pairs}'
    config.data.context = arg.context
    config.data.batch_size = 64
    config.steps = 4000
    config.optimizer.name = 'muon'
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.b2 = 0.98
    config.checkpoint.every_steps = 2000
    config.eval.every_steps = 500
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
    yield {'name': 'best', ':model': 'flash', **best}
    yield {'name': 'unit', ':model': 'flash'}
    yield {'name': 'shifted', ':model': 'flash', 'model.key_input': 'shifted'}
    window = {path: value for path, value in best.items() if path != 'model.decay_gate'}
    yield {'name': 'window', ':model': 'flash', **window, 'model.branches': 'local'}
    yield {'name': 'flash_quad', ':model': 'flash_quad'}
    yield {'name': 'transformer_plus_plus', ':model': 'transformer_plus_plus'}


def sweep_pairs() -> Iterator[Overrides]:
    """16 pairs lie within a chunk of 256 tokens, 256 over three of them."""
    for pairs in (16, 64, 256):
        yield {':pairs': pairs}
