"""The fields of a run: defaults with the paper's recipe, and the one place where a config is made whole and checked.

Light on purpose (no JAX), so that a script which only reads configs starts at once.
"""

import functools
import importlib.metadata
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict, config_dict

from gau import lookup
from gau.data import config as data_config
from gau.errors import UserError, check_name
from gau.models import config as model_config
from gau.models.architectures import ARCHITECTURES
from gau.training import durations

SCHEDULES = ('linear', 'cosine', 'constant', 'wsd')
CLIPPINGS = ('local', 'global', 'none')
SHARDINGS = ('parameters', 'data')
# Each optimizer's own fields with their defaults; the others are refused. Muon's are those of the AdamW that moves what
# is no matrix.
_ADAM = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-6}
OPTIMIZERS = {'adamw': _ADAM, 'adafactor': {}, 'lion': {'b1': 0.9, 'b2': 0.99}, 'muon': _ADAM}
# Fields of the optimizer with their defaults, and the choice that leaves them without meaning.
_IDLE = (('clip_norm', 0.1, 'clip', 'none'), ('final_fraction', 0.0, 'schedule', 'constant'))
# How much of a run the schedule `wsd` decays over, unless the config says.
_DECAY_PERCENT = 20.0
# Optimizers that move every number by what is known of it alone, and so can be cut anywhere.
ELEMENTWISE = ('adamw', 'lion')
# In 8 bits: nothing; the layers' kernels; these and what they are multiplied with.
QUANTIZATIONS = ('none', 'int8_weights', 'int8')
# Weight and temperature of the teacher.
_DISTILLATION = (0.5, 1.0)
# Places of a batch are counted in 32 bits.
_MOST_TOKENS = 2**31 - 1
MESH_AXES = ('data', 'fsdp', 'tensor', 'sequence')

# Fields that say where, how fast and how loudly a run computes, not what: they may differ when a run is resumed.
# (`fork` and `init_from`, too: they are settled when a run begins.)
RESUMABLE_CHANGES = (
    *('mesh.', 'optimizer.sharding', 'log.', 'fork', 'init_from', 'model.impl', 'distillation.teacher'),
    *('data.read_threads', 'data.prefetch_batches', 'data.cache_dir'),
    # What to do with documents that cannot be taken as they are: a run that meets one can go on without it.
    *('data.bad_lines', 'data.special_in_text'),
)


def default_config() -> ConfigDict:
    """Returns every field of a run with its default; None means "decided by another field".

    The optimizer follows the paper's recipe as far as it is recalled (no source at hand states it): AdamW 0.9 / 0.999,
    eps 1e-6, weight decay 0.01, linear decay from 7e-4 after 10 k of 125 k steps, "local" clipping at 0.1.

    seed: parameters, order of the data, dropout.
    fork: work directory of another run, from whose newest checkpoint this one starts; None starts from scratch.
    init_from: another run's work directory (its newest checkpoint), DIR/checkpoints/STEP or an export
      (scripts/export.py), whose parameters a new run starts with, at step 0 and with a new optimizer; the language
      model must fit whole, a head around it is drawn. None, or `fork` is.
    objective: what the model is trained for: a file of gau/objectives/, such as `lm` (next token, causal models) and
      `mlm` (masked tokens, bidirectional models), or `module:Class`.
    steps, tokens, epochs: length of the run, exactly one given.
    optimizer:
      name: `adamw`, `adafactor`, `lion` or `muon` (`gau.training.optimizer`).
      learning_rate: peak. schedule: `linear`, `cosine` or `constant` after the warm-up, or `wsd` (warm-up, stable,
      decay: constant, and a linear decay over the end of the run); final_fraction: of the peak, where the decay ends
      (None: 0; not for `constant`).
      learning_rate_rules: (regex, factor) pairs over parameter paths; the first regex found in the path decides what
        the learning rate is times there (the decay of weights, too), no match means 1.
      warmup_steps, _tokens, _epochs, _percent: exactly one given. decay_steps, _tokens, _epochs, _percent: of the decay
        at the end, for `wsd` only (none: 20 percent).
      b1, b2, eps: of adamw (None: 0.9, 0.999, 1e-6), of lion (0.9, 0.99, has no eps), and in muon of what is no matrix.
      frozen: regexes over parameter paths; a parameter in whose path one is found stays as it is, and has neither
        gradient nor moments.
      keep_zeros: regexes over parameter paths; weights that are 0 there stay 0, as those of a sparse model (not for
        parameters that start as zeros).
      weight_decay: decoupled, times the learning rate and the rule's factor.
      weight_decay_rules: (regex, factor) pairs over parameter paths such as `blocks_0/gau/out/kernel`; the first regex
        found in the path decides, no match means no decay; a regex that decides for no parameter is an error.
      clip: `local` (each parameter's gradient by its own norm), `global` or `none`; clip_norm: the bound
        (None: 0.1).
      accumulation_steps: micro-batches a step; the gradient is that of the whole batch.
      segment_tokens: tokens of a row that training reads at once, with the decoding state carried on (None: all);
        the gradient is that of the whole row, and memory hardly grows with it (`gau.training.recurrent`).
      sharding: how its state lies: as the `parameters`, or cut over the mesh axis `data`, too (ZeRO-1; adamw and lion):
        each device then updates its part of the parameters, and gets the rest from the others.
    checkpoint: every_steps, _tokens, _epochs, _percent; keep_last: newest ones kept; keep_every: steps whose multiples
      are kept for good (None: none). The last step is always saved.
    eval: what every evaluator does, unless its own entry says otherwise.
      every_steps, _tokens, _epochs, _percent: how often; at the end always. splits: of the data; contexts: lengths
      besides data.context (at the end only); max_tokens: of each split (None: all of it); batch_size: rows at
      data.context, other contexts keep its tokens (None: data.batch_size).
    distillation: teacher: work directory or checkpoint of another run with the same objective (lm, mlm) and tokenizer
      (None: none); the loss is (1 - weight) loss + weight temperature^2 KL(teacher || student), both softened by the
      temperature. Evaluations have the plain loss.
    quantization: `none`, `int8_weights` (the layers' kernels are rounded to 8 bits in every product) or `int8` (what
      they are multiplied with, too), by qwix and with model.impl=xla alone (`gau.training.quantization`).
    evaluators: NAME: {type, ...}; type is a file of gau/evaluation/ or `module:Class` (None: decided by the
      objective), and the entry may have every field of `eval` and the evaluator's own options. Rows in metrics.jsonl
      are named NAME/SPLIT. (In a config program: `config.evaluators.books = {'type': 'whole_documents'}`.)
    log: every_steps: distance of the train lines in metrics.jsonl.
    mesh: sizes of the axes data, fsdp, tensor, sequence; one may be -1, "the devices left over".
    """
    config = ConfigDict()
    config.seed = 0
    config.objective = 'lm'
    config.fork = config_dict.placeholder(str)
    config.init_from = config_dict.placeholder(str)
    config.steps = 125_000
    config.tokens = config_dict.placeholder(int)
    config.epochs = config_dict.placeholder(float)
    config.model = model_config.default_config()
    config.data = data_config.default_config()

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = 'adamw'
    optimizer.learning_rate = 7e-4
    optimizer.learning_rate_rules = ()
    optimizer.frozen = ()
    optimizer.keep_zeros = ()
    optimizer.schedule = 'linear'
    optimizer.final_fraction = config_dict.placeholder(float)
    _add_duration(optimizer, 'warmup_', steps=10_000)
    _add_duration(optimizer, 'decay_', steps=None)
    for field in _ADAM:
        optimizer[field] = config_dict.placeholder(float)
    optimizer.weight_decay = 0.01
    optimizer.weight_decay_rules = ((r'(^|/)kernel$', 1.0),)
    optimizer.clip = 'local'
    optimizer.clip_norm = config_dict.placeholder(float)
    optimizer.accumulation_steps = 1
    optimizer.segment_tokens = config_dict.placeholder(int)
    optimizer.sharding = 'parameters'

    config.checkpoint = checkpoint = ConfigDict()
    _add_duration(checkpoint, 'every_', steps=1000)
    checkpoint.keep_last = 3
    checkpoint.keep_every = config_dict.placeholder(int)

    config.eval = evaluation = ConfigDict()
    _add_duration(evaluation, 'every_', steps=1000)
    evaluation.splits = ('valid',)
    evaluation.contexts = ()
    evaluation.max_tokens = config_dict.placeholder(int)
    evaluation.batch_size = config_dict.placeholder(int)
    config.evaluators = ConfigDict({'eval': {'type': config_dict.placeholder(str)}})

    config.distillation = ConfigDict(
        {'teacher': config_dict.placeholder(str), 'weight': _DISTILLATION[0], 'temperature': _DISTILLATION[1]}
    )
    config.quantization = 'none'
    config.log = ConfigDict({'every_steps': 10})
    config.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'sequence': 1})
    return config


def _add_duration(section: ConfigDict, stem: str, *, steps: int | None) -> None:
    section[f'{stem}steps'] = config_dict.placeholder(int) if steps is None else steps
    section[f'{stem}tokens'] = config_dict.placeholder(int)
    section[f'{stem}epochs'] = config_dict.placeholder(float)
    section[f'{stem}percent'] = config_dict.placeholder(float)


def resolve(config: ConfigDict, *, given: Collection[str] = ()) -> ConfigDict:
    """Returns a frozen-in-meaning copy of `config`: every None that other fields decide is filled, everything checked.

    Args:
      config: as `default_config` returns it, with fields set.
      given: paths of the fields that a command line set over its config program (`gau.models.config.resolve`).

    Raises:
      UserError: an unknown name, a wrong combination or a number out of range.
    """
    # Imported late: objectives know NumPy, which a config that is only written down can do without.
    from gau.objectives import objective as objectives

    config = config.copy_and_resolve_references()
    objective = objectives.load(config.objective)
    optimizer = config.optimizer
    _resolve_optimizer(optimizer)
    if config.fork is not None and config.init_from is not None:
        raise UserError(f'fork={config.fork} and init_from={config.init_from}: a run starts from one of them')
    durations.given_unit(config, '', where='', units=durations.UNITS[:-1])
    durations.given_unit(optimizer, 'warmup_', where='optimizer.')
    _resolve_decay(optimizer)
    _check_ranges(config)
    _check_distillation(config)
    check_name('quantization', config.quantization, QUANTIZATIONS)
    _check_every('checkpoint', config.checkpoint)
    _resolve_evaluators(config, objective.evaluator)
    config.data = objective.resolve_data(config.data)
    tokens = config.data.batch_size * config.data.context
    if tokens > _MOST_TOKENS:
        raise UserError(f'data.batch_size * data.context is {tokens} tokens a step: want at most {_MOST_TOKENS}')
    if config.data.batch_size % optimizer.accumulation_steps:
        raise UserError(
            f'data.batch_size={config.data.batch_size} must be a multiple of '
            f'optimizer.accumulation_steps={optimizer.accumulation_steps}'
        )
    own = {'causal': objective.causal, 'context': config.data.context}
    config.model = model_config.resolve(config.model, **own, given=given)
    _check_segments(config)
    return config


def _resolve_optimizer(optimizer: ConfigDict) -> None:
    check_name('optimizer.name', optimizer.name, tuple(OPTIMIZERS))
    check_name('optimizer.schedule', optimizer.schedule, SCHEDULES)
    check_name('optimizer.clip', optimizer.clip, CLIPPINGS)
    check_name('optimizer.sharding', optimizer.sharding, SHARDINGS)
    if optimizer.sharding == 'data' and optimizer.name not in ELEMENTWISE:
        raise UserError(
            f'optimizer.sharding=data is for {" and ".join(ELEMENTWISE)}, not {optimizer.name}, '
            'whose steps need whole matrices'
        )
    own = OPTIMIZERS[optimizer.name]
    settings = [(field, own.get(field), field not in own, f'name={optimizer.name}') for field in _ADAM]
    settings += [
        (field, default, optimizer[other] == value, f'{other}={value}') for field, default, other, value in _IDLE
    ]
    for field, default, idle, choice in settings:
        if not idle and optimizer[field] is None:
            optimizer[field] = default
        elif idle and optimizer[field] is not None:
            raise UserError(f'optimizer.{field}={optimizer[field]} does nothing with optimizer.{choice}: leave it out')


def _resolve_decay(optimizer: ConfigDict) -> None:
    given = [f'decay_{unit}' for unit in durations.UNITS if optimizer[f'decay_{unit}'] is not None]
    if optimizer.schedule != 'wsd':
        if given:
            raise UserError(f'optimizer.{given[0]} is for optimizer.schedule=wsd, which is {optimizer.schedule}')
        return
    if not given:
        optimizer.decay_percent = _DECAY_PERCENT
    durations.given_unit(optimizer, 'decay_', where='optimizer.')


def drop_idle_fields(optimizer: ConfigDict) -> None:
    """Empties, in place, the fields of a stored optimizer section that were allowed once and did nothing."""
    for field, _, other, value in _IDLE:
        if optimizer[other] == value:
            optimizer[field] = None


def _check_ranges(config: ConfigDict) -> None:
    positive = ['steps', 'tokens', 'epochs', 'log.every_steps', 'optimizer.accumulation_steps', 'optimizer.eps']
    positive += ['optimizer.learning_rate', 'optimizer.clip_norm', 'optimizer.segment_tokens']
    positive += ['checkpoint.keep_last', 'checkpoint.keep_every']
    for path in positive:
        _check_positive(path, _field(config, path))
    for path, low, high in (
        ('seed', 0, 2**31 - 1),
        ('optimizer.final_fraction', 0, 1),
        ('optimizer.weight_decay', 0, 1e6),
    ):
        value = _field(config, path)
        if value is not None and not low <= value <= high:
            raise UserError(f'{path}={value} must lie in {low}..{high}')
    for path in ('optimizer.b1', 'optimizer.b2'):
        value = _field(config, path)
        # A mean with 1 never moves, and the correction of its start divides by zero.
        if value is not None and not 0 <= value < 1:
            raise UserError(f'{path}={value} must lie in 0..1, below 1')


def _check_distillation(config: ConfigDict) -> None:
    teacher, weight, temperature = (config.distillation[field] for field in ('teacher', 'weight', 'temperature'))
    if teacher is None:
        if (weight, temperature) != _DISTILLATION:
            raise UserError('distillation.weight and distillation.temperature do nothing without distillation.teacher')
        return
    if config.objective not in ('lm', 'mlm'):
        raise UserError(f'distillation.teacher is for the objectives lm and mlm, not for {config.objective}')
    if not 0 < weight <= 1:
        raise UserError(f'distillation.weight={weight} must lie in 0..1, above 0')
    _check_positive('distillation.temperature', temperature)


def _check_segments(config: ConfigDict) -> None:
    """Whether rows can be read in segments (`gau.training.recurrent`)."""
    segment, model, data = config.optimizer.segment_tokens, config.model, config.data
    if segment is None:
        return
    field = f'optimizer.segment_tokens={segment}'
    if data.context % segment:
        raise UserError(f'{field} must divide data.context={data.context}')
    for path, value in (
        *(('objective', 'lm'), ('data.packing', 'concat'), ('data.attend_across_documents', True)),
        *(('model.dropout_rate', 0), ('distillation.teacher', None), ('mesh.sequence', 1)),
    ):
        if _field(config, path) != value:
            raise UserError(f'{field} needs {path}={value}, this is {_field(config, path)}')
    attention = ARCHITECTURES[model.name].attention
    reason = attention.refuses_decoding(model)
    keeper = attention.what_keeps_all_tokens(model)
    if reason is None and keeper is not None:
        reason = f'that of {keeper} grows with the row'
    if reason is not None:
        raise UserError(f'{field} carries a state of one size: {reason}')


def evaluators(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the entries of `config.evaluators` by name, each with what it leaves to `config.eval` filled in."""
    entries = {}
    for name, entry in config.evaluators.items():
        # A duration stands in one unit: an entry's own takes the place of the shared one, whatever its unit.
        own_duration = any(field.startswith('every_') for field in entry)
        shared = {field: x for field, x in config.eval.items() if not (own_duration and field.startswith('every_'))}
        entries[name] = ConfigDict({**shared, **entry})
    return entries


def _resolve_evaluators(config: ConfigDict, default: str) -> None:
    for entry in config.evaluators.values():
        if entry.get('type') is None:
            entry.type = default
    for name, entry in {'': config.eval, **evaluators(config)}.items():
        where = f'evaluators.{name}' if name else 'eval'
        if name == 'train' or '/' in name:
            raise UserError(f'{where}: an evaluator cannot be named "{name}": its rows are named NAME/SPLIT')
        if name:
            lookup.check(f'{where}.type', entry.type, 'evaluation')
        _check_every(where, entry)
        for field in ('max_tokens', 'batch_size'):
            _check_positive(f'{where}.{field}', entry[field])
        for context in entry.contexts:
            if not isinstance(context, int) or not 0 < context <= _MOST_TOKENS:
                raise UserError(f'{where}.contexts={entry.contexts}: {context!r} is no number of tokens')
        if not entry.splits:
            raise UserError(f'{where}.splits=() names no split to evaluate')


def _check_every(where: str, section: ConfigDict) -> None:
    unit = durations.given_unit(section, 'every_', where=f'{where}.')
    _check_positive(f'{where}.every_{unit}', section[f'every_{unit}'])


def _field(config: ConfigDict, path: str) -> Any:
    return functools.reduce(lambda section, name: section[name], path.split('.'), config)


def _check_positive(path: str, value: float | None) -> None:
    if value is not None and not 0 < value < float('inf'):
        raise UserError(f'{path}={value} must be positive and finite')


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns `field: old -> new` for every field in which two configs (nested dicts) differ in meaning."""
    flat_old, flat_new = flatten(old), flatten(new)
    return [
        f'{path}: {flat_old.get(path, "absent")} -> {flat_new.get(path, "absent")}'
        for path in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(path) != flat_new.get(path) and not path.startswith(RESUMABLE_CHANGES)
    ]


def with_new_fields(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns a config (nested dict) with the fields that only `defaults` has added at their values there."""
    whole = {key: stored.get(key, value) for key, value in defaults.items()} | stored
    return {
        # Which evaluators there are is one value.
        key: with_new_fields(value, defaults[key])
        if isinstance(value, dict) and isinstance(defaults.get(key), dict) and key != 'evaluators'
        else value
        for key, value in whole.items()
    }


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns a config (nested dict) as one dict by dotted field."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested dict that `flatten` was given."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, field = path.split('.')
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        section[field] = value
    return tree


@functools.cache
def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that decide what a checkpoint means."""
    # Looked up once: it takes 18 ms, for which every checkpoint would hold the steps up.
    names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    return {name: importlib.metadata.version(name) for name in names}
