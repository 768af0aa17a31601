"""What a model is: the fields of its config, their defaults, and the combinations that are refused."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES, SIZES, Architecture
from gau.models.fields import Field, Filler, check_choice, unknown


def declared_fields() -> dict[str, Field]:
    """Returns every field that some model has, but for `name` and `size`.

    `gau.models.fields.COMMON` declares those of every model, a record in `families` or `attentions` those of its own;
    `scripts/describe.py --fields` prints them.
    """
    declared, impls = {}, ['auto']
    for architecture in ARCHITECTURES.values():
        declared |= architecture.fields
        impls += architecture.attention.implementations
    declared['impl'] = declared['impl']._replace(choices=tuple(dict.fromkeys(impls)))
    return dict(sorted(declared.items()))


def default_config() -> ConfigDict:
    """Returns the model's config with nothing chosen but `name` and `size`; None means what these two say.

    name: key of `architectures.ARCHITECTURES`.
    size: 'tiny', 'small', 'base' or 'large'; sets layers, width and heads (`architectures.SIZES`).
    The others: see `declared_fields`.
    """
    config = ConfigDict()
    config.name = 'flash'
    config.size = 'base'
    for name, field in declared_fields().items():
        config[name] = placeholder(field.kind)
    return config


def resolve(config: ConfigDict, *, causal: bool, context: int, given: Collection[str] = ()) -> ConfigDict:
    """Returns a copy of `config` with every field that applies filled in; the others stay None.

    Resolving a resolved config changes nothing.

    Args:
      config: as `default_config` returns it, with fields set.
      causal: whether later tokens are hidden from earlier ones, as a language model asks.
      context: tokens in a sequence, the longest the model is trained on.
      given: paths of fields (`model.branches`) that were set over those of a config program. Where the program's own
        fields are against them, the error names what to leave out.

    Raises:
      UserError: a field is unknown, has a wrong value, does not apply to the model or goes not with another.
    """
    try:
        return _resolve(config, causal=causal, context=context)
    except UserError as error:
        against = _against(config, given, causal=causal, context=context) if given else []
        if not against:
            raise
        empty = ' '.join(f'--config.model.{name}=None' for name in against)
        raise UserError(f'{error}; what the config program sets against this is left out by {empty}') from error


def _against(config: ConfigDict, given: Collection[str], *, causal: bool, context: int) -> list[str]:
    """Returns fields, set and not given, without which a refused config is accepted, and of which none can be spared.

    An empty list, where the fault is in the given ones.
    """
    own = [name for name in declared_fields() if config.get(name) is not None and f'model.{name}' not in given]

    def accepted(without: Collection[str]) -> bool:
        changed = config.copy_and_resolve_references()
        for name in without:
            changed[name] = None
        try:
            _resolve(changed, causal=causal, context=context)
        except UserError:
            return False
        return True

    if not accepted(own):
        return []
    against = own
    for name in own:
        fewer = [other for other in against if other != name]
        against = fewer if accepted(fewer) else against
    return against


def _resolve(config: ConfigDict, *, causal: bool, context: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    declared = declared_fields()
    others = sorted(set(config) - {'name', 'size', *declared})
    if others:
        raise UserError(f'model.{others[0]} does not exist{unknown(others[0], default_config())}')
    check_choice('model.name', config.name, ARCHITECTURES)
    check_choice('model.size', config.size, SIZES)
    architecture = ARCHITECTURES[config.name]
    attention, family = architecture.attention, architecture.family
    if causal and attention.not_causal:
        raise UserError(f'model.name={config.name} cannot be a causal language model: {attention.not_causal}')
    if context < 1:
        raise UserError(f'context must be at least 1, not {context}')
    had = set(config)
    for name, field in declared.items():
        # What a registered model brought along may be missing in an older config.
        if config.get(name) is None:
            config[name] = None
        else:
            field.check(name, config[name])

    defaults = _applying_defaults(config, architecture)
    # A config without open fields was resolved before; what stands there need not be anybody's choice for this context.
    # (Fields that came later an older config does not have.)
    resolved = all(config[name] is not None for name in defaults if name in had)
    fill = Filler(config, defaults)
    chosen = frozenset() if resolved else fill.chosen
    size = SIZES[config.size]
    fill('num_layers', size.gau_layers * family.blocks_for_two_units // 2)
    fill('model_dim', size.model_dim)
    attention.fill(fill, causal=causal, context=context)
    family.fill(fill)
    for name, value in defaults.items():
        fill(name, value)
        if config[name] is None:
            raise AssertionError(f'{name} was left open: no record of {config.name} fills it')
    _check_common(config, architecture, causal)
    family.check(config)
    attention.check(config, causal=causal, context=context, chosen=chosen)
    return config


def _applying_defaults(config: ConfigDict, architecture: Architecture) -> dict[str, Any]:
    """Returns the default of every field that has a meaning; refuses what is set of the others."""
    defaults = {name: field.default for name, field in architecture.fields.items()}
    # A field whose meaning another one took away is treated like one the model never had.
    idle = architecture.family.idle_fields(config) | architecture.attention.idle_fields(config)
    for name in declared_fields():
        if name in idle or name not in defaults:
            if config[name] is not None:
                reason = idle.get(name) or _applies_to(name)
                raise UserError(f'model.{name}={config[name]} does not apply to {config.name}: {reason}')
            defaults.pop(name, None)
    return defaults


def _check_common(config: ConfigDict, architecture: Architecture, causal: bool) -> None:
    options = ('auto', *architecture.attention.implementations)
    if config.impl not in options:
        raise UserError(f'model.impl={config.impl} does not exist for {config.name}; choose from {", ".join(options)}')
    if config.rope == 'local' and len(architecture.attention.pairs(config)) < 2:
        raise UserError('model.rope=local is of attention inside chunks and between them; use rotary or none')
    if config.absolute_position == 'sinusoid' and config.model_dim % 2:
        raise UserError(f'model.absolute_position=sinusoid needs an even model_dim, not {config.model_dim}')
    if not causal and (config.short_convolution or 0) % 2:
        raise UserError(
            f'model.short_convolution={config.short_convolution} must be even where the model is bidirectional: half '
            'of it lies before a token and half after'
        )


def _applies_to(name: str) -> str:
    names = [model for model, architecture in ARCHITECTURES.items() if name in architecture.fields]
    return f'it is a field of {", ".join(names)}'
