"""Writes text with a trained model: python scripts/sample.py --workdir=DIR [--prompt=TEXT] [--max_tokens=256] ...

Meant for a look at what a model has learned: each token runs the model over the whole text so far.
"""

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError

flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.')
flags.DEFINE_string('prompt', '', 'Text to continue.')
flags.DEFINE_integer('num', 1, 'How many continuations to write.', lower_bound=1)
flags.DEFINE_integer('max_tokens', 256, 'Tokens to write.', lower_bound=1)
flags.DEFINE_float('temperature', 0.8, '0 takes the likeliest token each time.', lower_bound=0.0)
flags.DEFINE_integer('seed', 0, 'Of the draws.')


def main() -> None:
    """Prints the prompt and what the model makes of it."""
    from gau.training import evaluate, sampling

    run, params, _ = evaluate.load_run(flags.FLAGS.workdir, step=flags.FLAGS.step)
    if run.config.objective != 'lm':
        raise UserError(f'--workdir={flags.FLAGS.workdir} holds a masked language model, which does not write text')
    tokenizer = run.tokenizer
    written = sampling.sample(
        run.model,
        params,
        tokenizer.encode(flags.FLAGS.prompt),
        bos_id=tokenizer.bos_id,
        max_tokens=flags.FLAGS.max_tokens,
        temperature=flags.FLAGS.temperature,
        seed=flags.FLAGS.seed,
        num=flags.FLAGS.num,
    )
    for row in written:
        ends = (row == tokenizer.eos_id).nonzero()[0]
        print(flags.FLAGS.prompt + tokenizer.decode(row[: ends[0]] if len(ends) else row))


if __name__ == '__main__':
    cli.run(main)
