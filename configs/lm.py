"""Causal language modelling: FLASH, FLASH-Quad or a baseline, at contexts 512 to 8192.

    python scripts/prepare_data.py --source=tfds:wiki40b/en --train_tokenizer=32000 --output=data/wiki40b
    python train.py --config=configs/lm.py:model=flash,size=base,context=8192 --workdir=runs/flash_8192

Arguments:
  model: a name of docs/models.md. size: tiny, small, base or large. context: tokens.
  data: wiki40b, pg19, c4 or lm1b, prepared in data/NAME; or any source, such as embedded or jsonl:PATH.
  tokenizer: bytes, sentencepiece:FILE or huggingface:FILE; by default that of the prepared shards, or bytes.
  recipe: best or paper. runlocal.

recipe=paper is recalled and not read in a source: 2^18 tokens a step at every context, 125 k steps, AdamW, peak
learning rate 7e-4 after 10 k steps of warm-up, linear decay, weight decay 0.01, clipping at 0.1 parameter by parameter.

recipe=best is the same with Muon at 4e-3, no sinusoid beside RoPE, and for FLASH what brought it ahead of Transformer++
(docs/results/quality_shifted.md): shifted keys, and above 256 tokens of context a window of two chunks of 128 and a
gate on the state. All of it was found in runs of 2,000 steps of 2^16 tokens. Ablations that it refuses (more heads, one
branch, another decay) start from recipe=paper.

Result to expect: the full recipe (33 G tokens) has not been run here; the paper reports, on Wiki-40B at 8192, a
perplexity of 15.109 for FLASH and 15.254 for Transformer++. `:runlocal` (tiny, 20 steps on the embedded corpus) takes
seconds on two CPU cores and shows that everything works, nothing more.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/lm.py:arg`."""
    arg = common.parse_arg(arg, model='flash', size='base', context=1024, data='wiki40b', tokenizer='', recipe='best')
    config = common.pretraining_config(arg)
    return common.run_local(config, arg.given) if arg.runlocal else config
