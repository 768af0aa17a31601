"""Turning any source into token shards: in parallel, resumable after a kill, the same bytes however it went.

A plan, written first, fixes which documents go into which shard; it depends on the source and the options alone, never
on the number of workers. A shard is written under a temporary name, synced and renamed, so one with its final name is
whole; its counts go into a note beside the plan. What has both is done. The manifest comes last and makes the directory
readable.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gau import ctrl_c
from gau.data import documents as docs
from gau.data import examples, manifest, plans, shards, sources, tokenizers
from gau.errors import UserError

_WORK = '.work'
_SHARD_BYTES = 64 * 2**20
_LEAST_SHARDS = 16
_TRAINED = 'tokenizer.model'
# The trainer's sums depend on how it splits the work, so the number of its threads is fixed, not the machine's.
_TRAINER_THREADS = 16
_LONGEST_SENTENCE = 4096


@dataclasses.dataclass(frozen=True)
class Shard:
    """A range of the documents of a split and the file it goes to."""

    split: str
    number: int
    count: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """The shard's file name."""
        return f'{self.split}-{self.number:05d}-of-{self.count:05d}.arrayrecord'


def prepare(
    config: ConfigDict,
    output: str | os.PathLike[str],
    *,
    splits: list[str] | None = None,
    train_tokenizer: int | None = None,
    sample_bytes: int = 2**25,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the shards and the manifest of a source into the directory `output`; goes on where a kill stopped it.

    Args:
      config: the resolved data config: source, tokenizer, and what speaks to the source.
      output: a new or empty directory, or one that the same call left unfinished or finished.
      splits: which splits to write (None: all).
      train_tokenizer: train a SentencePiece model of this vocabulary on the training documents first, in place of
        config.tokenizer.
      sample_bytes: of text, spread evenly over the training documents, to train it on.
      workers: processes (None: one a core).
      progress: called with (documents done, all documents) after every shard.

    Returns:
      The manifest.

    Raises:
      UserError: bad source or options; `output` holds something else or is being written by another process.
    """
    output = pathlib.Path(output)
    splits = splits or sources.splits(config)
    opened = {split: _one(sources.open_split(config, split), config) for split in splits}
    with _claim(output):
        plan = _plan(config, opened, train_tokenizer, sample_bytes)
        if (output / manifest.FILE).exists():
            contents = manifest.read(output)
            plans.check_same(plan, contents['plan'], output)
            shutil.rmtree(output / _WORK)
            return contents
        _start(output, plan, config)
        spec = config.tokenizer
        if train_tokenizer is not None:
            # Whatever is written: a tokenizer must not have seen what a model is measured on.
            texts = opened['train'] if 'train' in opened else _one(sources.open_split(config, 'train'), config)
            spec = _train_tokenizer(output / _TRAINED, texts, train_tokenizer, sample_bytes)
        tokenizer = tokenizers.load(spec)
        dtype = shards.token_dtype(tokenizer.vocab_size)
        jobs = [Shard(**job) for job in plan['shards']]
        notes = _write_shards(config, output, jobs, spec, dtype, workers or os.cpu_count() or 1, progress)
        contents = {
            'format': manifest.FORMAT,
            'tokenizer': {
                'spec': _keep_tokenizer(output, spec),
                'fingerprint': tokenizer.fingerprint,
                'vocab_size': tokenizer.vocab_size,
            },
            'dtype': dtype,
            'splits': {split: _totals([note for note in notes if note['split'] == split]) for split in splits},
            'plan': plan,
        }
        _write_json(output / manifest.FILE, contents)
        shutil.rmtree(output / _WORK)
    return contents


def _one(opened: list[docs.Documents], config: ConfigDict) -> docs.Documents:
    if len(opened) != 1:
        raise UserError(f'data.source="{config.source}": prepare each source of a mixture by itself, mix the prepared')
    if not len(opened[0]):
        raise UserError(f'data.source="{config.source}" has no documents to prepare')
    return opened[0]


@contextlib.contextmanager
def _claim(output: pathlib.Path) -> Iterator[None]:
    """Holds the directory against another process that prepares into it; the lock dies with its holder."""
    try:
        if output.is_dir() and not (output / _WORK).is_dir() and not (output / manifest.FILE).exists():
            strangers = sorted(path.name for path in output.iterdir())
            if strangers:
                raise UserError(f'{output}: holds something else ({strangers[0]}): choose a new or empty directory')
        found = (output / _WORK).exists()
        (output / _WORK).mkdir(parents=True, exist_ok=True)
        lock = open(output / _WORK / 'lock', 'w')  # noqa: SIM115
    except OSError as error:
        raise UserError(f'{output}: cannot write there: {error.strerror}') from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f'{output}: another process is preparing it') from error
        try:
            yield
        except BaseException:
            # A finished directory stays as it was.
            if not found and (output / manifest.FILE).exists():
                shutil.rmtree(output / _WORK, ignore_errors=True)
            raise


def _plan(
    config: ConfigDict,
    opened: dict[str, docs.Documents],
    train_tokenizer: int | None,
    sample_bytes: int,
) -> dict[str, Any]:
    options = {
        field: config[field]
        for field in (
            'source',
            'text_field',
            'text_unit',
            'valid_source',
            'test_source',
            'holdout_every',
            *plans.POLICIES,
        )
    }
    if train_tokenizer is None:
        tokenizer = {'fingerprint': tokenizers.load(config.tokenizer).fingerprint}
    else:
        tokenizer = {'train': train_tokenizer, 'sample_bytes': sample_bytes}
    jobs = []
    for split, documents in opened.items():
        total = len(documents)
        wanted = max(_LEAST_SHARDS, math.ceil(_estimated_bytes(documents) / _SHARD_BYTES))
        size = math.ceil(total / min(wanted, total))
        count = math.ceil(total / size)
        jobs += [dataclasses.asdict(Shard(split, i, count, i * size, min(total, (i + 1) * size))) for i in range(count)]
    return {'options': options, 'tokenizer': tokenizer, 'files': sources.text_files(config), 'shards': jobs}


def _estimated_bytes(documents: docs.Documents) -> float:
    """Returns about the bytes of text, from documents spread evenly."""
    chosen = np.unique(np.linspace(0, len(documents) - 1, 64).astype(int))
    sizes = [examples.size(document)[0] for document in map(documents.__getitem__, chosen.tolist()) if document]
    return len(documents) * float(np.mean(sizes)) if sizes else 0.0


def _start(output: pathlib.Path, plan: dict[str, Any], config: ConfigDict) -> None:
    """Writes the plan, or checks that it is the one there; as long as there is no shard, another one may replace it."""
    path = output / _WORK / 'plan.json'
    found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else None
    if found is not None and any(output.glob('*.arrayrecord')):
        plans.check_same(plan, found, output)
    elif found != json.loads(json.dumps(plan)):
        trained = output / _TRAINED
        # Of the plan before; it may be the one asked for by its name.
        if pathlib.Path(config.tokenizer.partition(':')[2]).resolve() != trained.resolve():
            trained.unlink(missing_ok=True)
        _write_json(path, plan)
    for part in (output / _WORK).glob('part-*'):
        part.unlink()


def _write_shards(
    config: ConfigDict,
    output: pathlib.Path,
    jobs: list[Shard],
    spec: str,
    dtype: str,
    workers: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Writes every shard that is not there yet; returns the notes of all, in order."""
    notes = {job: _note(output, job) for job in jobs}
    missing = [job for job in jobs if notes[job] is None]
    total = sum(job.stop - job.start for job in jobs)
    done = total - sum(job.stop - job.start for job in missing)
    progress(done, total)
    if missing:
        arguments = (config.to_json(), spec, str(output), dtype)
        with futures.ProcessPoolExecutor(
            min(workers, len(missing)),
            mp_context=multiprocessing.get_context('spawn'),
            initializer=_Worker.start,
            initargs=arguments,
        ) as pool:
            try:
                # The pool would not wait for a worker that it does not know yet.
                with ctrl_c.starting_workers():
                    running = {pool.submit(_Worker.write, job): job for job in missing}
                for future in futures.as_completed(running):
                    job = running[future]
                    notes[job] = future.result()
                    done += job.stop - job.start
                    progress(done, total)
            except BaseException:
                # As long as a worker writes the directory is not to be let go.
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return [notes[job] for job in jobs]


def _note(output: pathlib.Path, job: Shard) -> dict[str, Any] | None:
    note = output / _WORK / f'{job.file}.json'
    whole = note.exists() and (output / job.file).exists()
    return json.loads(note.read_text(encoding='utf-8')) if whole else None


class _Worker:
    """What a worker process opens once."""

    config: ConfigDict
    tokenizer: tokenizers.Tokenizer
    output: pathlib.Path
    dtype: str
    opened: dict[str, docs.Documents]

    @classmethod
    def start(cls, config: str, spec: str, output: str, dtype: str) -> None:
        # Ctrl-C reaches the whole group; the parent decides, after the shards under way are whole.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A killed parent cannot tell its workers; they must not go on writing into a directory somebody else may claim.
        parent = multiprocessing.parent_process()
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        cls.config = ConfigDict(json.loads(config))
        cls.tokenizer, cls.output, cls.dtype, cls.opened = tokenizers.load(spec), pathlib.Path(output), dtype, {}

    @classmethod
    def write(cls, job: Shard) -> dict[str, Any]:
        """Writes one shard and its note; returns the note."""
        if job.split not in cls.opened:
            cls.opened[job.split] = sources.open_split(cls.config, job.split)[0]
        part = cls.output / _WORK / f'part-{job.file}'
        skipped = 0

        def tokenized() -> Iterator[tuple[np.ndarray, int, int]]:
            nonlocal skipped
            for index in range(job.start, job.stop):
                document = cls.opened[job.split][index]
                if document is None:
                    skipped += 1
                    continue
                yield examples.encode(document, cls.tokenizer), *examples.size(document)

        note = shards.write(part, tokenized(), cls.dtype)
        _sync(part)
        note |= {'file': job.file, 'split': job.split, 'skipped': skipped, 'size': part.stat().st_size}
        part.rename(cls.output / job.file)
        _write_json(cls.output / _WORK / f'{job.file}.json', note)
        return note


def _totals(notes: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {key: sum(note[key] for note in notes) for key in ('documents', 'tokens', 'bytes', 'words', 'skipped')}
    return totals | {'shards': [{key: note[key] for key in note if key != 'split'} for note in notes]}


def _keep_tokenizer(output: pathlib.Path, spec: str) -> str:
    """Copies the tokenizer's file beside the shards; returns the spec with that name."""
    kind, colon, path = spec.partition(':')
    if not colon:
        return spec
    kept = output / f'tokenizer{pathlib.Path(path).suffix}'
    if kept != pathlib.Path(path):
        _write_atomically(kept, pathlib.Path(path).read_bytes())
    return f'{kind}:{kept.name}'


def _train_tokenizer(path: pathlib.Path, documents: docs.Documents, vocab_size: int, sample_bytes: int) -> str:
    """Trains a SentencePiece model that loses nothing of a text, unless it is there; returns its spec."""
    spec = f'sentencepiece:{path}'
    if path.exists():
        return spec
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents, sample_bytes),
            model_writer=model,
            model_type='unigram',
            vocab_size=vocab_size,
            # Nothing is normalised away, and what the vocabulary lacks is spelt in bytes.
            normalization_rule_name='identity',
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _LONGEST_SENTENCE,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols='<mask>',
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f'--train_tokenizer={vocab_size}: SentencePiece says: {error}') from error
    _write_atomically(path, model.getvalue())
    return spec


def _sentences(documents: docs.Documents, sample_bytes: int) -> Iterator[str]:
    """Yields the lines of documents spread evenly over the source, about `sample_bytes` of them."""
    share = sample_bytes / max(_estimated_bytes(documents), 1.0)
    every = max(1.0, 1.0 / share)
    left = sample_bytes
    for step in range(len(documents)):
        index = int(step * every)
        if index >= len(documents) or left <= 0:
            return
        document = documents[index]
        if document is None:
            continue
        left -= examples.size(document)[0]
        for line in document.text.split('\n'):
            for start in range(0, len(line), _LONGEST_SENTENCE):
                yield line[start : start + _LONGEST_SENTENCE].encode('utf-8', errors='replace').decode('utf-8')


def _write_json(path: pathlib.Path, contents: dict[str, Any]) -> None:
    _write_atomically(path, json.dumps(contents, indent=1).encode('utf-8'))


def _write_atomically(path: pathlib.Path, contents: bytes) -> None:
    part = path.with_name(f'.part-{path.name}')
    part.write_bytes(contents)
    _sync(part)
    part.replace(path)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
