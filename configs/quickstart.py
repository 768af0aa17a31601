"""FLASH on bytes of Python's own standard library: the whole way in two minutes on two CPU cores.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Arguments: model (any causal model of docs/models.md), runlocal.

What counts here is minutes, not tokens. Hence:
- a small batch and a high rate: after a million tokens 512 a step had 2.17 bits per byte, 2,048 a step 2.63 (L01)
- few layers, many steps, and Muon (L40)
- a convolution over the bytes before each, for 10 % of the time (L52)
- for FLASH softmax in a window of two chunks: relu^2 takes longer to find one byte among many, and a step takes as long
  (L72)
"""

from ml_collections import ConfigDict

from configs import common
from gau.training import config as training_config


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/quickstart.py:arg`."""
    arg = common.parse_arg(arg, model='flash')
    config = training_config.default_config()
    config.steps = 4200
    config.model.name = arg.model
    config.model.size = 'tiny'
    config.model.dtype = 'float32'
    config.model.num_layers = 3
    config.model.model_dim = 128
    config.model.short_convolution = 3
    if arg.model == 'flash':
        config.model.query_key_dim = 64
        config.model.chunk_size = 64
        config.model.attention_function = 'softmax'
        config.model.local_window = 2
    config.data.source = 'embedded'
    config.data.tokenizer = 'bytes'
    config.data.context = 256
    config.data.batch_size = 2
    config.mesh.data = 1  # two rows do not divide over every machine's devices
    config.optimizer.name = 'muon'
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.98
    config.checkpoint.every_steps = 600
    config.eval.every_steps = 600
    config.eval.max_tokens = 32_768
    config.eval.batch_size = 32
    config.log.every_steps = 20
    return common.run_local(config, arg.given) if arg.runlocal else config
