"""Evaluates a checkpoint: python eval.py --workdir=DIR [--step=K] [--contexts=512,1024] [--splits=...].

The work directory says what to build, which data to read and what to measure (`config.evaluators`). Other evaluators,
and other text than the run's own:

    python eval.py --workdir=DIR --evaluators=whole_documents --contexts=8192
    python eval.py --workdir=DIR --evaluators=perplexity_in_chunk:chunk=128,passkey:texts=64
    python eval.py --workdir=DIR --config.data.source=jsonl:books.jsonl --splits=train

Prints a table, appends to DIR/eval.jsonl and draws into DIR/plots/. Exit codes: 0 done; 2 bad usage, in one line on
stderr; 1 anything else.
"""

from absl import flags

from gau import cli

cli.define_processes()
flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.')
flags.DEFINE_list(
    'evaluators',
    None,
    "Evaluators, comma separated: names of the config's entries (by default all), or types; fields behind a colon.",
)
flags.DEFINE_list('contexts', None, "Context lengths, comma separated; the config's own by default.")
flags.DEFINE_list('splits', None, "Data splits, comma separated; the config's eval.splits by default.")
flags.DEFINE_alias('split', 'splits')
flags.DEFINE_integer(
    'max_tokens', None, "Tokens of each split to use; the config's eval.max_tokens by default.", lower_bound=1
)


def main() -> None:
    """Runs every evaluator on every split at every context."""
    from gau.training import evaluate

    with cli.processes():
        evaluate.evaluate(
            flags.FLAGS.workdir,
            step=flags.FLAGS.step,
            evaluators=flags.FLAGS.evaluators,
            contexts=cli.parse_positive_integers('contexts', flags.FLAGS.contexts),
            splits=flags.FLAGS.splits,
            max_tokens=flags.FLAGS.max_tokens,
            config=flags.FLAGS.config,
            changed=cli.overrides(),
        )


if __name__ == '__main__':
    cli.run(main, stored_config=True)
