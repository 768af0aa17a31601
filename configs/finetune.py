"""Fine-tuning: which class a text, or a pair of texts, belongs to, from a trained model or from nothing.

    python scripts/cut_passages.py --source='jsonl:books/*.jsonl' --label_field=author --output=data/authors
    python train.py --config=configs/finetune.py:start=runs/flash --workdir=runs/authors
    python eval.py --workdir=runs/authors --contexts=512,1024
    python scripts/sweep.py --config=configs/finetune.py --sweep=starts:RUN:RUN,seed:3 --workdir=runs/starts

Question: what is it worth to have read other text before? The task: who of 20 authors wrote a passage of some 1,000
tokens, from a book that no training passage comes from?

Arguments:
  start: a work directory, a checkpoint or an export. The model is that one's, field by field, with its tokenizer.
    Causal models are asked at the last token, bidirectional ones for the mean over all.
  drawn: the model of start with new weights.
  model, size, tokenizer, masked (a bidirectional model): in place of start.
  data, valid: JSON lines with `label`, `text` and, for pairs, `text_b`; by default data/authors.
  context, runlocal.
The sweep `starts` takes any number of models.

Recipe: 600 steps of 32 passages, AdamW at 3e-4 with linear decay after 60 steps, and ten times that for the head, which
is new. A model from nothing (drawn) has 1e-3.

Result: docs/results/authors.md, accuracy 0.50 (FLASH) and 0.45 (Transformer++) from trained models, 0.40 and 0.30 from
nothing. `:runlocal` classifies the embedded corpus and shows that everything works.
"""

from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from configs import common
from gau.experiments.sweep import Overrides
from gau.training import config as training_config

AUTHORS = 'jsonl:data/authors'


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/finetune.py:arg`."""
    arg = common.parse_arg(
        arg,
        start='',
        drawn=False,
        model='flash',
        size='small',
        tokenizer='',
        masked=False,
        context=1024,
        data='',
        valid='',
    )
    config = training_config.default_config()
    config.model.name = arg.model
    config.model.size = arg.size
    config.model.dropout_rate = 0.1
    config.data.source = arg.data or f'{AUTHORS}/train.jsonl'
    config.data.valid_source = arg.valid or (None if arg.data else f'{AUTHORS}/valid.jsonl')
    config.data.context = arg.context
    config.data.batch_size = 32
    if arg.tokenizer:
        config.data.tokenizer = arg.tokenizer
    config.steps = 600
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 60
    config.optimizer.b2 = 0.98
    config.optimizer.learning_rate_rules = ((r'^head/', 10.0),)
    config.optimizer.clip = 'global'
    config.optimizer.clip_norm = 1.0
    config.checkpoint.every_steps = 300
    config.checkpoint.keep_last = 1
    config.eval.every_steps = 200
    config.log.every_steps = 20
    if arg.runlocal:
        common.run_local(config, arg.given)
        if not arg.data:
            config.data.valid_source = None
    masked = arg.masked
    if arg.start:
        masked = not common.start_from(config, arg.start)
    if arg.drawn:
        config.init_from = None
        config.optimizer.learning_rate = 1e-3
    config.objective = 'classification' if masked else 'causal_classification'
    return config


def sweep_starts(*trained: str) -> Iterator[Overrides]:
    """Every model from what it has learned, and from nothing."""
    for directory in trained:
        yield {'name': f'{Path(directory).name}_trained', ':start': directory}
        yield {'name': f'{Path(directory).name}_drawn', ':start': directory, ':drawn': True}
