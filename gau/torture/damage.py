"""Files cut at random places: runs, prepared tokens, packed text, tokenizers.

A program of its own (`python -m gau.torture.damage DIRECTORY SEED COUNT`), because many inputs are tried in one process
and because a library that dies of one must not take the campaign along: after each it prints its tally as a line.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

from gau import cli
from gau.errors import RunFailed, UserError
from gau.torture.lab import STEPS, compare_runs
from gau.torture.tally import Tally, to_json

_LINES = [f'{{"text": "document {number} of those that are cut, {"word " * 20}"}}' for number in range(200)]


def cut(path: Path, rng: random.Random, *, empty: bool = True) -> str:
    """Cuts a file at a random place (or, if `empty`, of all its bytes or of itself); returns what was done to it."""
    size = path.stat().st_size
    deed = rng.choice(('cut', 'cut', 'cut', 'emptied', 'removed') if empty else ('cut',))
    if deed == 'removed':
        path.unlink()
        return f'{path.name} removed'
    left = 0 if deed == 'emptied' or size < 2 else rng.randrange(1, size)
    with path.open('r+b') as file:
        file.truncate(left)
    return f'{path.name} cut from {size} to {left} bytes'


def _fingerprint(directory: Path) -> dict[str, str]:
    """Returns what each file holds; the lock is nobody's work."""
    files = [path for path in directory.rglob('*') if path.is_file() and path.name != '.lock']
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class _Files:
    """Makes damaged copies of what the campaign has made, and tries the house on them."""

    def __init__(self, directory: Path, seed: int):
        self.directory, self.rng = directory, random.Random(seed)
        self.trained, self.tokens = directory / 'trained', directory / 'tokens'
        self.work = directory / f'damaged_{seed}'
        self.kinds = (self.run, self.run, self.prepared, self.prepared, self.packed, self.tokenizer)

    def one(self, tally: Tally, kind: Callable[[Tally], None] | None = None) -> None:
        """Damages something, of a kind or of any, and tries it."""
        (kind or self.rng.choice(self.kinds))(tally)
        shutil.rmtree(self.work, ignore_errors=True)

    def _try(self, tally: Tally, what: str, use: Callable[[], str], keep: Path | None = None) -> bool:
        """Calls `use`, which says in what its result differs; returns whether it has one."""
        tally.faults += 1
        tally.runs += 1
        before = _fingerprint(keep) if keep else {}
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                different = use()
        except (UserError, RunFailed) as error:
            tally.refused += 1
            if '\n' in str(error).strip():
                tally.prints(what, f'Traceback (most recent call last): of several lines: {error}')
            if keep and _fingerprint(keep) != before:
                tally.differs(f'{what}: refused, and yet something was written: {error}')
            return False
        except Exception:
            tally.prints(what, traceback.format_exc())
            return False
        tally.prints(what, printed.getvalue())
        if different:
            tally.differs(f'{what}: {different}')
        return True

    def run(self, tally: Tally) -> None:
        """A file of a run: it goes on, from the checkpoint before if need be, or refuses; or it is evaluated."""
        from gau.training import evaluate, loop
        from gau.training.workdir import config_from_dict

        config = json.loads((self.trained / 'config.json').read_text())
        workdir = shutil.copytree(self.trained, self.work / 'run')
        files = sorted(path for path in workdir.rglob('*') if path.is_file())
        if self.rng.random() < 0.7:
            files = [path for path in files if str(STEPS) in path.parts or path.parent == workdir]
        path = self.rng.choice(files)
        name = str(path.relative_to(workdir))
        what = f'{name}: {cut(path, self.rng)}'
        if self.rng.random() < 0.5:

            def use() -> str:
                (workdir / 'final.json').unlink(missing_ok=True)
                loop.train(config_from_dict(config), workdir)
                return compare_runs(workdir, self.trained, metrics=not name.startswith('metrics'))

            # What is damaged itself is replaced, and the result is made anew.
            self._try(tally, f'training: {what}', use)
        else:
            expected = json.loads((self.trained / 'final.json').read_text())['eval']['valid']['loss']

            def use() -> str:
                (cases,) = evaluate.evaluate(workdir).values()
                (metrics,) = cases.values()
                return '' if metrics['loss'] == expected else f'loss {metrics["loss"]}, not {expected}'

            self._try(tally, f'evaluating: {what}', use, keep=workdir)

    def prepared(self, tally: Tally) -> None:
        """A shard, the manifest or another file of prepared tokens."""
        tokens = shutil.copytree(self.tokens, self.work / 'tokens')
        path = self.rng.choice(sorted(path for path in tokens.iterdir() if path.is_file()))
        what = f'tokens: {cut(path, self.rng)}'
        self._try(tally, what, lambda: self._reads_as(f'tokens:{tokens}', f'tokens:{self.tokens}'), keep=tokens)

    def packed(self, tally: Tally) -> None:
        """A compressed file that ends in the middle, which must never pass for a shorter one."""
        import zstandard

        pack = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress, 'zst': zstandard.compress}
        suffix = self.rng.choice(sorted(pack))
        self.work.mkdir(parents=True)
        paths = [self.work / f'{name}.jsonl.{suffix}' for name in ('whole', 'cut')]
        for path in paths:
            path.write_bytes(pack[suffix]('\n'.join(_LINES).encode()))
        what = cut(paths[1], self.rng, empty=False)
        self._try(tally, what, lambda: self._reads_as(*(f'jsonl:{path}' for path in paths[::-1])))

    def tokenizer(self, tally: Tally) -> None:
        """A tokenizer's file."""
        from gau.data import tokenizers

        whole = _tokenizer_file(self.directory)
        self.work.mkdir(parents=True)
        path = Path(shutil.copy(whole, self.work))
        what = cut(path, self.rng)

        def use() -> str:
            found, expected = (tokenizers.load(f'huggingface:{file}').encode(_LINES[0]) for file in (path, whole))
            return '' if found.tolist() == expected.tolist() else 'other tokens'

        try:
            self._try(tally, f'tokenizer: {what}', use)
        finally:
            tokenizers.load.cache_clear()

    def _reads_as(self, source: str, expected: str) -> str:
        """Reads all documents of two sources; says whether they differ."""
        from gau.data import config as data_config
        from gau.data import examples, sources, tokenizers

        def read(source: str) -> list[list[int]]:
            config = data_config.default_config()
            config.source, config.context, config.cache_dir = source, 32, None
            if source.startswith('jsonl:'):
                config.cache_dir = str(self.work / 'cache')
            config = data_config.resolve(config, objective='lm')
            tokenizer = tokenizers.load(config.tokenizer)
            opened = [documents for split in ('train', 'valid') for documents in sources.open_split(config, split)]
            found = (documents[index] for documents in opened for index in range(len(documents)))
            return [examples.encode(document, tokenizer).tolist() for document in found if document is not None]

        return '' if read(source) == read(expected) else 'other documents'


def _tokenizer_file(directory: Path) -> Path:
    """Returns the path of a small Hugging Face tokenizer, which is made if it is not there."""
    path = directory / 'tokenizer.json'
    if not path.exists():
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_LINES, trainer)
        tokenizer.save(str(path))
    return path


def main(arguments: list[str]) -> None:
    """Prints a tally after every input, of that input alone."""
    directory, seed, count = arguments
    files = _Files(Path(directory), int(seed))
    for _ in range(int(count)):
        tally = Tally('damaged files')
        files.one(tally)
        print(to_json(tally), flush=True)


if __name__ == '__main__':
    # As the commands start, which leave out what Orbax prints of reads that have failed.
    cli.run(main, arguments=True)
