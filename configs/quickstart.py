"""FLASH on bytes of Python's own standard library: the whole way in two minutes on two CPU cores.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Arguments: model (flash, flash_quad, transformer_plus_plus, ...), runlocal.
"""

from ml_collections import ConfigDict

from configs import common
from gau.training import config as training_config


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/quickstart.py:arg`."""
    arg = common.parse_arg(arg, model='flash')
    config = training_config.default_config()
    config.model.name = arg.model
    config.model.size = 'tiny'
    config.model.dtype = 'float32'
    config.data.source = 'embedded'
    config.data.tokenizer = 'bytes'
    config.data.context = 512
    config.data.batch_size = 8
    config.steps = 300
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 30
    config.checkpoint.every_steps = 100
    config.eval.every_steps = 100
    return common.run_local(config) if arg.runlocal else config
