"""A finished or running run, opened for reading: by eval.py, scripts/sample.py and notebooks (`gau.load_run`)."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import tokenizers
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError
from gau.models.implementations import lacks
from gau.models.target import Target
from gau.training import workdir as files
from gau.training.checkpoints import Checkpoints
from gau.training.config import resolve
from gau.training.setup import Run, use_compilation_cache

# Fields that may be others when a run is read than when it was trained.
READABLE = ('data.', 'eval.', 'evaluators.', 'model.impl', 'quantization')
# Fields of `data` that say where documents come from and how they are cut out of it.
_OF_THE_SOURCE = (
    *('source', 'text_field', 'text_unit', 'bad_lines', 'special_in_text', 'valid_source', 'test_source'),
    *('holdout_every', 'tfds_dir', 'mixture'),
)
# Fields of `data` that decide in which order training reads.
_OF_TRAINING = ('data.shuffle', 'data.shuffle_window', 'data.streams')


def load_run(
    workdir: str | Path, *, step: int | None = None, config: ConfigDict | None = None, tensor: int = 1
) -> tuple[Run, Any, int]:
    """Opens a work directory for reading.

    Args:
      workdir: directory of a run.
      step: checkpoint to load; None means the newest.
      config: the run's config with other data, evaluators or implementation (`with_changes`); None means its own.
      tensor: over how many devices each layer is split, in plain JAX, which the compiler splits; it divides them all.

    Returns:
      The run, the checkpoint's parameters and its step.

    Raises:
      UserError: no run there, no such checkpoint, a damaged one, or a tokenizer that it was not trained with.
    """
    workdir = Path(workdir)
    trained = files.with_data_found(workdir, files.read_config(workdir))
    config = ConfigDict(trained if config is None else config)
    use_compilation_cache()
    config = resolve(config)
    # Whatever mesh trained it, the parameters are divided over the devices at hand: over all, or over as many as their
    # width allows, and the others hold copies.
    fsdp = math.gcd(jax.device_count() // tensor, config.model.model_dim)
    config.mesh = ConfigDict({'data': -1, 'fsdp': fsdp, 'tensor': tensor, 'sequence': 1})
    if tensor > 1:
        config.model.impl = 'xla'
    # Nor is it a reason not to read that the chosen implementation is not for the chip at hand.
    if lacks(config.model, Target.of_device(jax.devices()[0])):
        config.model.impl = 'auto'
    run = Run.from_config(config)
    saved = Checkpoints(workdir)
    try:
        steps = saved.steps()
    finally:
        saved.close()
    if not steps:
        raise UserError(f'{saved.directory} has no checkpoint yet')
    if step is not None and step not in steps:
        raise UserError(f'{saved.directory} has no checkpoint of step {step}; it has {steps}')
    chosen = steps[-1] if step is None else step
    check_tokenizer(run.tokenizer, trained.data.tokenizer, _fingerprint(saved, chosen))
    return run, saved.restore_params(run.abstract_params, step=chosen), chosen


def with_changes(config: ConfigDict, changed: Collection[str]) -> ConfigDict:
    """Returns a run's config, some of whose fields have been changed, as `load_run` takes it.

    What another source makes meaningless (the stored config says how documents were cut out of the old one) is decided
    anew, unless it is among the changed fields itself.

    Args:
      config: with the new values.
      changed: paths of the changed fields, such as `data.source`.

    Raises:
      UserError: a field that decides how the run was trained, or when it was evaluated.
    """
    for path in sorted(changed):
        if not path.startswith(READABLE):
            raise UserError(
                f'--config.{path}: a run is read with the model and the training that it has; '
                'what can be changed is data, eval, evaluators, model.impl and quantization'
            )
        field = path.rpartition('.')[2]
        if path.startswith(('eval.', 'evaluators.')) and (field == 'contexts' or field.startswith('every_')):
            raise UserError(f'--config.{path} says what training does: it does nothing here, contexts are --contexts')
        if path in _OF_TRAINING:
            raise UserError(f'--config.{path} is of the order in training: a split is read from its beginning')
    config = config.copy_and_resolve_references()
    defaults = data_config.default_config()
    if 'data.source' in changed:
        anew = _OF_THE_SOURCE
    else:
        anew = ('holdout_every',) if 'data.valid_source' in changed else ()
    for field in anew:
        if f'data.{field}' not in changed:
            config.data[field] = defaults[field]
    return config


def _fingerprint(saved: Checkpoints, step: int) -> str | None:
    """Returns the fingerprint of the tokenizer that a checkpoint was trained with, if it can be read."""
    return saved.meta(step).get('data', {}).get('tokenizer')


def check_tokenizer(tokenizer: Tokenizer, trained_with: str, fingerprint: str | None) -> None:
    """Raises UserError unless tokens mean what they meant in training.

    Args:
      tokenizer: what the run would be read with.
      trained_with: the spec of the tokenizer in the run's own config.
      fingerprint: of that tokenizer when the checkpoint was saved.
    """
    if fingerprint in (None, tokenizer.fingerprint):
        return
    try:
        own = tokenizers.load(trained_with)
    except UserError:
        own = None
    if own is None or own.fingerprint != fingerprint or not _same_vocabulary(own, tokenizer):
        raise UserError(
            f'data.tokenizer={tokenizer.spec} (fingerprint {tokenizer.fingerprint}) is not the tokenizer that the '
            f'checkpoint was trained with: {trained_with} (fingerprint {fingerprint})'
        )


def _same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Returns whether every id stands for the same text, files differing in what does not matter."""

    def specials(tokenizer: Tokenizer) -> tuple[int, ...]:
        return (
            *(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id),
            *np.flatnonzero(~tokenizer.ordinary).tolist(),
        )

    if specials(a) != specials(b):
        return False
    # Characters of one to four bytes. Parts of them decode alike, so their ids are compared by encoding.
    probe = ''.join(map(chr, range(32, 0x250))) + ' the — 漢字 😀'
    if not np.array_equal(a.encode(probe), b.encode(probe)):
        return False
    # Behind another token, where a space at the beginning of a piece shows.
    before = int(a.encode('a')[-1])
    return all(a.decode([before, token]) == b.decode([before, token]) for token in range(a.vocab_size))
