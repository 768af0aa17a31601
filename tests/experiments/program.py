"""A config program for tests: one narrow layer, and sweeps of every kind, good and bad."""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, context=64, steps=12)
    config = quickstart.get_config('runlocal')
    config.model.num_layers = 1
    config.model.model_dim = 32
    config.model.query_key_dim = 16
    config.model.chunk_size = 16
    # A chunk may be as long as the context here, where a window of the quickstart's would be refused.
    config.model.local_window = None
    config.data.context = arg.context
    config.data.batch_size = 2
    config.steps = arg.steps
    config.checkpoint.every_steps = 5
    config.eval.every_steps = 4
    config.eval.max_tokens = 500
    return config


def sweep_chunk_size():
    for size in (16, 32):
        yield {'model.chunk_size': size}


def sweep_expansion():
    for factor in (1.0, 2.0):
        yield {'model.expansion_factor': factor}


def sweep_long():
    yield {'name': 'table', ':context': 512, 'model.chunk_size': 512}
    yield {'name': 'rotary', ':context': 2048, 'model.chunk_size': 1024}


def sweep_heads():
    yield {'model.num_heads': 1}
    yield {'model.num_heads': 5}


def sweep_rate(*rates):
    for rate in rates:
        yield {'optimizer.learning_rate': rate}


def sweep_not_dicts():
    yield 3


def sweep_returns():
    return 3


def sweep_nameless():
    yield {'model.chunk_size': 8, 'name': '/'}


def sweep_open():
    yield {'model.gate': None}


def sweep_unknown():
    yield {'model.chunk_sise': 3}
