"""Masked language modelling with the paper's recipe: the bidirectional models, at contexts 512 to 8192.

    python scripts/prepare_data.py --source=tfds:c4/en --train_tokenizer=32000 --output=data/c4
    python train.py --config=configs/mlm.py:model=flash,size=base,context=512 --workdir=runs/flash_mlm

Arguments: those of configs/lm.py, with data=c4 by default. `config.data.mlm` says how tokens are masked: 15 % are
predicted, as in the paper (recalled); of these 80 % show the mask, 10 % a random token and 10 % themselves, as in BERT.

Recipe: the paper's, as in configs/lm.py. recipe=best differs in one thing, where the bias starts; the rest of
configs/lm.py's has not been tried on masked tokens.

Result to expect: the full recipe has not been run here; the paper reports, on C4 at 8192, a perplexity of 3.897 for
FLASH and 3.933 for Transformer++. Short runs: docs/results/models_mlm.md. `:runlocal` takes seconds on two CPU cores
and shows that everything works.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/mlm.py:arg`."""
    arg = common.parse_arg(arg, model='flash', size='base', context=512, data='c4', tokenizer='', recipe='best')
    config = common.pretraining_config(arg, objective='mlm')
    return common.run_local(config, arg.given) if arg.runlocal else config
