"""Made-up runs, whose numbers are known."""

from gau.experiments.runs import Run
from gau.training.config import default_config, flatten, resolve
from gau.training.workdir import config_to_dict

CONFIG = flatten(config_to_dict(resolve(default_config())))


def made_up(loss, *, seed=0, name=None, tokens=1000, data='embedded', speed=100.0, eval_tokens=500, **fields):
    config = {**CONFIG, 'seed': seed, **{path.replace('__', '.'): value for path, value in fields.items()}}
    label = name or '-'.join(map(str, fields.values())) or 'base'
    return Run(
        name=f'{label}-seed_{seed}',
        label=label,
        swept=[path.replace('__', '.') for path in fields],
        config=config,
        metrics={'valid': {'loss': loss, 'perplexity': 2 * loss, 'tokens': eval_tokens}},
        curves={
            'valid': [[step * 100, step * 0.5, loss + (10 - step) / 10] for step in (2, 4, 6, 8, 10)],
            'train': [[1000, 5.0, loss]],
        },
        facts={
            'command': f'python train.py --config.seed={seed}',
            'commits': ['abc'],
            'device': '1 x cpu',
            'versions': {},
            'tokenizer': 'bytes',
            'data': {data: 'f00d'},
            'tokens': tokens,
            'parameters': 1_500_000,
            'flops_per_token': 10.0,
            'tokens_per_second': speed,
        },
    )


def models(**changes):
    losses = {'flash': (3.0, 3.1, 3.05), 'transformer_plus_plus': (3.2, 3.28, 3.26)}
    return [
        made_up(loss, seed=seed, model__name=model, **changes)
        for model, own in losses.items()
        for seed, loss in enumerate(own)
    ]
