"""Evaluates a checkpoint: python eval.py --workdir=DIR [--step=K] [--contexts=512,1024] [--splits=...] [--stream].

The work directory alone says what to build and which data to read. Prints a table and appends to DIR/eval.jsonl; the
loss by position goes to DIR/plots/. Exit codes: 0 done; 2 bad usage, in one line on stderr; 1 anything else.
"""

from absl import flags

from gau import cli

cli.define_processes()
flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.')
flags.DEFINE_list('contexts', None, "Context lengths, comma separated; the config's own by default.")
flags.DEFINE_list('splits', None, "Data splits, comma separated; the config's eval.splits by default.")
flags.DEFINE_alias('split', 'splits')
flags.DEFINE_integer('max_tokens', None, "Tokens of each split to use; the config's eval.max_tokens by default.")

flags.DEFINE_boolean(
    'stream', False, 'Read whole texts with the state carried to their ends, and once for each context without.'
)


def main() -> None:
    """Evaluates every split at every context."""
    from gau.training import evaluate

    with cli.processes():
        evaluate.evaluate(
            flags.FLAGS.workdir,
            step=flags.FLAGS.step,
            contexts=cli.parse_positive_integers('contexts', flags.FLAGS.contexts),
            splits=flags.FLAGS.splits,
            max_tokens=flags.FLAGS.max_tokens,
            stream=flags.FLAGS.stream,
        )


if __name__ == '__main__':
    cli.run(main)
