"""What is measured: one cell is one kind of measurement of one model with its settings at one context (no JAX here)."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gau import lookup
from gau.errors import UserError, did_you_mean
from gau.models import counts
from gau.models.architectures import ARCHITECTURES, SIZES
from gau.models.config import declared_fields, default_config, resolve
from gau.objectives import objective as objectives
from gau.training.config import OPTIMIZERS

# Kinds of measurement, and how many forward passes one step's matmuls amount to.
PASSES = {'train': 3, 'forward': 1}
KINDS = ('train', 'forward', 'decode', 'prefill')
# Kinds that share a process, where memory is not measured and the same programs serve many cells.
SHARED = ('memory', 'decode', 'prefill')
# The rates of this chip that shares are told of, beside the data sheet's: of matmuls, and of its memory.
MATMUL, MEMORY = RATES = ('matmul', 'memory')

# Baselines in PyTorch: the model of ours whose FLOPs theirs are counted by, and what `impl` may be.
TORCH_MODELS = {
    'torch_flash_lucidrains': ('flash', ('compiled', 'eager')),
    'torch_transformer_plus_plus': ('transformer_plus_plus', ('compiled', 'compiled_cudnn', 'eager')),
}


class Spec(NamedTuple):
    """A model with the settings to measure it at, written
    `model:impl:remat:layer_stack:accumulation_steps:segment_tokens:field=value:...`.

    Attributes:
      model: name in the registry, or of a baseline in PyTorch.
      impl: `config.model.impl`; of a baseline: how PyTorch runs it.
      remat, layer_stack: as in `config.model`; None for a baseline, which has neither.
      accumulation_steps: micro-batches of a training step.
      segment_tokens: tokens of a row that a training step reads at once, with its state carried on; 0: all.
      overrides: other fields of `config.model` with their values, in the order of their names.
    """

    model: str
    impl: str = 'auto'
    remat: str | None = 'none'
    layer_stack: str | None = 'unrolled'
    accumulation_steps: int = 1
    segment_tokens: int = 0
    overrides: tuple[tuple[str, Any], ...] = ()


# What a cell or a part of its own says, so that no `field=value` may.
_SAID_ELSEWHERE = {'dtype': '--quick takes float32, anything else bfloat16'} | {
    name: f'it is a part of its own: model:{":".join(Spec._fields[1:-1])}' for name in ('impl', 'remat', 'layer_stack')
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement, complete: what the process that makes it is told.

    Attributes:
      benchmark: one of KINDS; or MATMUL, of two square matrices with edges of `context`; or MEMORY, an array of so many
        MiB read and written.
      spec: the model and its settings; of a rate nothing.
      size: of the model, `config.model.size`.
      context: tokens in a sequence; tokens that a new one looks back on (decode); tokens of the prompt (prefill).
      batch_size: sequences side by side.
      objective: 'lm', 'mlm' or, for the models that read a source, 'halves'.
      packed: whether sequences are made of documents packed end to end that do not see each other.
      optimizer: of training steps, `config.optimizer.name`.
      dtype: compute type.
      vocab_size: V.
      effort: 'full', or 'quick' for fewer and smaller samples.
      profile: whether the kernels of one more sample (of a pass: of one more step) are told.
    """

    benchmark: str
    spec: Spec
    size: str
    context: int
    batch_size: int
    objective: str = 'lm'
    packed: bool = False
    optimizer: str = 'adamw'
    dtype: str = 'bfloat16'
    vocab_size: int = 32_000
    effort: str = 'full'
    profile: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping) -> 'Cell':
        """Undoes `dataclasses.asdict` after a journey through JSON."""
        *parts, overrides = fields['spec']
        return cls(**{**fields, 'spec': Spec(*parts, tuple((name, value) for name, value in overrides))})

    @property
    def by_torch(self) -> bool:
        """Whether this is a baseline in PyTorch."""
        return self.spec.model in TORCH_MODELS

    @property
    def causal(self) -> bool:
        """Whether later tokens are hidden."""
        return objectives.load(self.objective).causal

    def model_config(self) -> ConfigDict:
        """Returns the resolved model config (of a baseline: that of the model whose FLOPs it is counted by).

        Raises:
          UserError: a combination that the model refuses.
        """
        # The objective first: it may bring its models along, and they their fields.
        causal, config = self.causal, default_config()
        config.name, config.size, config.dtype = self.spec.model, self.size, self.dtype
        if self.by_torch:
            config.name = TORCH_MODELS[self.spec.model][0]
        else:
            config.impl, config.remat, config.layer_stack = self.spec.impl, self.spec.remat, self.spec.layer_stack
            config.update(dict(self.spec.overrides))
        return resolve(config, causal=causal, context=self.context)

    def flops_per_token(self) -> float:
        """Returns the FLOPs of one forward pass per token, by `gau.models.counts`; packing is not considered there."""
        return counts.flops_per_token(
            self.model_config(), context=self.context, vocab_size=self.vocab_size, causal=self.causal
        )


def parse_spec(text: str, *, impls: Sequence[str], remat: str, layer_stack: str) -> list[Spec]:
    """Returns the specs that a text stands for, written as `Spec` says.

    Parts may be left out at the end or be empty; those that set a field of `config.model` come last.

    Args:
      text: what the user wrote.
      impls: one spec for each of them, where the text names no impl. A baseline has its own: 'auto' compiles it.
      remat, layer_stack: where the text names none.

    Raises:
      UserError: a name that does not exist, a wrong value, or a setting that the model does not have.
    """
    model, *parts = text.strip().split(':')
    _check_choice('--models', model, (*ARCHITECTURES, *TORCH_MODELS))
    settings = list(itertools.takewhile(lambda part: '=' not in part, parts))
    names = Spec._fields[1:-1]
    if len(settings) > len(names):
        raise UserError(f'--models={text}: want at most model:{":".join(names)}, and then field=value')
    overrides = _parse_overrides(text, model, parts[len(settings) :])
    given = dict(zip(names, settings, strict=False))
    given = {name: value for name, value in given.items() if value}
    for name in ('accumulation_steps', 'segment_tokens'):
        if name in given and (not given[name].isdecimal() or int(given[name]) == 0):
            raise UserError(f'--models={text}: {name} "{given[name]}" is not a positive integer')
    steps, segment = int(given.get('accumulation_steps', 1)), int(given.get('segment_tokens', 0))
    if model in TORCH_MODELS:
        for name in [*given, *dict(overrides)]:
            if name not in ('impl', 'accumulation_steps'):
                raise UserError(f'--models={text}: {model} has no {name}')
        own = TORCH_MODELS[model][1]
        impl = given.get('impl', 'auto')
        _check_choice(f'--models={text}: impl', impl, ('auto', *own))
        return [Spec(model, own[0] if impl == 'auto' else impl, None, None, steps)]
    specs = []
    for impl in [given['impl']] if 'impl' in given else impls:
        stack = given.get('layer_stack', layer_stack)
        spec = Spec(model, impl, given.get('remat', remat), stack, steps, segment, overrides)
        for name in ('impl', 'remat', 'layer_stack'):
            _check_choice(f'--models={text}: {name}', getattr(spec, name), declared_fields()[name].choices)
        specs.append(spec)
    return specs


def check_objective(name: str) -> None:
    """Loads an objective, which makes the models known that belong to it alone.

    Raises:
      UserError: it does not exist.
    """
    _check_choice('--objective', name, lookup.names('objectives'))
    objectives.load(name)


def names(text: str, setting: str) -> bool:
    """Returns whether what a user wrote, as `parse_spec` takes it, says one of a spec's settings, or can have none."""
    model, *parts = text.strip().split(':')
    settings = dict(zip(Spec._fields[1:], itertools.takewhile(lambda part: '=' not in part, parts), strict=False))
    return model in TORCH_MODELS or bool(settings.get(setting))


def _parse_overrides(text: str, model: str, parts: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    overrides = {}
    for part in parts:
        name, equals, value = part.partition('=')
        if not equals:
            raise UserError(f'--models={text}: "{part}" stands behind field=value, where only others of these may')
        if name in overrides:
            raise UserError(f'--models={text}: {name} is set twice')
        if name in _SAID_ELSEWHERE:
            raise UserError(f'--models={text}: {name} is not set like this: {_SAID_ELSEWHERE[name]}')
        _check_choice(f'--models={text}: config.model.{name}', name, declared_fields())
        field = declared_fields()[name]
        if model in ARCHITECTURES and name not in ARCHITECTURES[model].fields:
            raise UserError(f'--models={text}: {model} has no {name}')
        try:
            overrides[name] = field.kind(value)
        except ValueError as error:
            raise UserError(f'--models={text}: {name}={value}: want {field.kind.__name__}') from error
        try:
            field.check(name, overrides[name])
        except UserError as error:
            raise UserError(f'--models={text}: {error}') from error
    return tuple(sorted(overrides.items()))


def label(row: Mapping) -> str:
    """Returns the model of a row with every setting that is not the default, as `parse_spec` reads it."""
    default = TORCH_MODELS[row['model']][1][0] if row['model'] in TORCH_MODELS else 'auto'
    parts = [row['impl'] if row['impl'] != default else '']
    usual = {'remat': 'none', 'layer_stack': 'unrolled', 'accumulation_steps': 1, 'segment_tokens': 0}
    for name, value in usual.items():
        # (Rows of before there were segments have none.)
        parts.append('' if row.get(name) in (value, None) else str(row[name]))
    name = ':'.join([row['model'], *parts]).rstrip(':')
    # (Nor have they this.)
    return ':'.join([name, *(f'{field}={value}' for field, value in row.get('overrides', {}).items())])


def plan(
    specs: Sequence[Spec],
    *,
    kinds: Sequence[str],
    contexts: Mapping[str, Sequence[int]],
    tokens_per_step: int,
    batch_sizes: Sequence[int],
    matmul_edge: int,
    memory_mib: int,
    own_contexts: Mapping[Spec, Sequence[int]] | None = None,
    **common,
) -> list[Cell]:
    """Returns the cells of one round, those to be compared next to each other.

    Args:
      specs: models with their settings, to be measured at `contexts`.
      kinds: of measurement, out of KINDS.
      contexts: of each kind.
      tokens_per_step: of train and forward; the batch is that over the context, at least 1.
      batch_sizes: of decode; prefill takes one sequence.
      matmul_edge: of the matrices that the chip's own rate is measured with.
      memory_mib: of the array that the rate of its memory is measured with.
      own_contexts: of models with their settings, where those are measured, too.
      **common: fields that all cells share.

    Raises:
      UserError: a kind or a combination that does not exist.
    """
    for kind in kinds:
        _check_choice('--what', kind, KINDS)
    _check_choice('--size', common['size'], SIZES)
    check_objective(common.get('objective', 'lm'))
    if common.get('objective') == 'halves':
        if common.get('packed'):
            raise UserError('--packed is of rows of text: those of --objective=halves hold a pair each')
        for spec in (*specs, *(own_contexts or {})):
            if spec.model in TORCH_MODELS:
                raise UserError(f'--objective=halves does not measure {spec.model}: PyTorch baselines know lm and mlm')
    _check_choice('--optimizer', common.get('optimizer', 'adamw'), OPTIMIZERS)
    cells = []
    if not PASSES.keys().isdisjoint(kinds):
        cells.append(Cell(MATMUL, Spec(MATMUL), context=matmul_edge, batch_size=1, **common))
    if 'decode' in kinds:
        cells.append(Cell(MEMORY, Spec(MEMORY), context=memory_mib, batch_size=1, **common))
    own_contexts = own_contexts or {}
    wanted = {spec: {*own_contexts.get(spec, ())} for spec in (*specs, *own_contexts)}
    for kind in kinds:
        for context in dict.fromkeys(itertools.chain(contexts[kind], *own_contexts.values())):
            batches = (
                [max(tokens_per_step // context, 1)] if kind in PASSES else batch_sizes if kind == 'decode' else [1]
            )
            for batch_size in batches:
                for spec, own in wanted.items():
                    if context not in own and not (spec in specs and context in contexts[kind]):
                        continue
                    _check_kind(kind, spec)
                    cells.append(Cell(kind, spec, context=context, batch_size=batch_size, **common))
    return list(dict.fromkeys(cells))


def _check_kind(kind: str, spec: Spec) -> None:
    if kind in PASSES:
        for name, usual in (('accumulation_steps', 1), ('segment_tokens', 0)):
            if kind == 'forward' and getattr(spec, name) != usual:
                raise UserError(f'--models={spec.model}: {name}={getattr(spec, name)} speaks to train only')
        return
    if spec.model in TORCH_MODELS:
        raise UserError(f'--what={kind} does not measure {spec.model}: PyTorch baselines know train and forward')
    if spec != Spec(spec.model, overrides=spec.overrides):
        raise UserError(
            f'--what={kind} takes models by name and field=value alone, {spec.model} has settings of train and '
            'forward: measure them in a call of their own'
        )


def _check_choice(where: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise UserError(f'{where}: "{value}" does not exist{did_you_mean(value, options)}')
