"""Turns a source of text into token shards, which `data.source="tokens:DIR"` reads.

    python scripts/prepare_data.py --source='jsonl:corpus/*.jsonl.gz' --tokenizer=sentencepiece:my.model --output=tokens
    python scripts/prepare_data.py --source='text:books/*.txt' --train_tokenizer=32000 --output=tokens

Works on all cores. Killed, it goes on where it was when the same command is given again, and the result is the same.
SIGINT and SIGTERM let the shards under way become whole; the exit codes are 130 and 143.
"""

import signal
import sys
from types import FrameType

import _root  # noqa: F401
from absl import flags
from tqdm import tqdm

from gau import cli
from gau.data import config as data_config
from gau.data import prepare, sources
from gau.errors import UserError, did_you_mean

_SOURCE = flags.DEFINE_string('source', None, 'text:GLOB, jsonl:GLOB, tfds:NAME[/CONFIG] or embedded', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Directory for the shards and their manifest', required=True)
_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'bytes, sentencepiece:MODEL_FILE or huggingface:TOKENIZER_JSON')
_TRAIN = flags.DEFINE_integer(
    'train_tokenizer', None, 'Train a SentencePiece model of this vocabulary on the source', lower_bound=260
)
_SAMPLE = flags.DEFINE_float(
    'tokenizer_sample_mb', 32.0, 'MB of text to train it on', lower_bound=0.001, upper_bound=1e6
)
_SPLITS = flags.DEFINE_list('splits', None, 'Splits to write (default: all the source has)')
_WORKERS = flags.DEFINE_integer('workers', None, 'Processes (default: one a core)', lower_bound=1)
# The fields of the data config that speak to sources of text, under their own names.
_FIELDS = ('text_field', 'text_unit', 'bad_lines', 'special_in_text', 'valid_source', 'test_source')
_FIELDS += ('cache_dir', 'tfds_dir')
for _field in _FIELDS:
    flags.DEFINE_string(_field, None, f'As the config field data.{_field}')
_HOLDOUT = flags.DEFINE_integer('holdout_every', None, 'As the config field data.holdout_every')


def main() -> int | None:
    """Prepares, and prints what came of it; 130 when interrupted by SIGINT, 143 by SIGTERM."""
    terminated = []

    def terminate(number: int, frame: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    config = data_config.default_config()
    config.source, config.tokenizer, config.holdout_every = _SOURCE.value, _TOKENIZER.value, _HOLDOUT.value
    for field in _FIELDS:
        config[field] = flags.FLAGS[field].value
    if (_TOKENIZER.value is None) == (_TRAIN.value is None):
        raise UserError('give one of --tokenizer and --train_tokenizer')
    cli.refuse_without('tokenizer_sample_mb', beside=('train_tokenizer',))
    if _SPLITS.value == []:
        raise UserError('--splits= names none: leave it out for all that the source has')
    config = data_config.resolve(config, objective='lm')
    for split in _SPLITS.value or []:
        if split not in sources.splits(config):
            raise UserError(f'--splits: unknown split "{split}"{did_you_mean(split, sources.splits(config))}')
    try:
        contents = prepare.prepare(
            config,
            _OUTPUT.value,
            splits=_SPLITS.value,
            train_tokenizer=_TRAIN.value,
            sample_bytes=int(_SAMPLE.value * 2**20),
            workers=_WORKERS.value,
            progress=_Progress(),
        )
    except KeyboardInterrupt:
        print('\ninterrupted: the same command goes on from here', file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    _print_table(contents)
    return None


class _Progress:
    """A bar that shows itself with the first shard, so that an error before stands alone."""

    def __call__(self, done: int, total: int) -> None:
        if not hasattr(self, '_bar'):
            self._bar = tqdm(total=total, initial=done, unit=' documents', smoothing=0.1)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


def _print_table(contents: dict) -> None:
    tokenizer = contents['tokenizer']
    print(f'{_OUTPUT.value}: tokenizer {tokenizer["spec"]}, {tokenizer["vocab_size"]} ids, {tokenizer["fingerprint"]}')
    print(f'{"split":8}{"shards":>8}{"documents":>12}{"skipped":>9}{"tokens":>16}{"bytes":>16}{"bytes/token":>13}')
    for split, totals in contents['splits'].items():
        print(
            f'{split:8}{len(totals["shards"]):8,}{totals["documents"]:12,}{totals["skipped"]:9,}{totals["tokens"]:16,}'
            f'{totals["bytes"]:16,}{totals["bytes"] / max(totals["tokens"], 1):13.2f}'
        )
    print(f'train on it with --config.data.source=tokens:{_OUTPUT.value}')


if __name__ == '__main__':
    cli.run(main)
