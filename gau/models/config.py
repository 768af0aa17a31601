"""What a model is: the fields of its config, their defaults, and the combinations that are refused."""

import math
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gau.errors import UserError, did_you_mean
from gau.models.architectures import ARCHITECTURES, HEAD_DIM, SIZES, Architecture

ENUMS = {
    'gate': ('silu', 'none'),
    'gamma_init': ('normal', 'ones'),
    'attention_function': ('relu2', 'softmax', 'laplace', 'softplus2', 'smooth_relu2'),
    'normalizer': ('paper', 'fixed', 'visible', 'su'),
    'temperature': ('learned', 'none'),
    'relative_bias': ('toeplitz', 'rotary', 'none'),
    'branches': ('both', 'local', 'global'),
    'global_reduction': ('mean', 'sum'),
    'feed_forward': ('gelu', 'geglu', 'swiglu'),
    'feature_map': ('relu', 'favor'),
    'norm': ('scale_norm', 'layer_norm', 'rms_norm'),
    'norm_placement': ('pre', 'post'),
    'absolute_position': ('sinusoid', 'none'),
    'rope': ('rotary', 'none'),
    'dtype': ('bfloat16', 'float32', 'float64'),
    'layer_stack': ('unrolled', 'scan'),
    'remat': ('none', 'full', 'dots', 'dots_no_batch'),
    'impl': ('auto', 'reference', 'xla', 'triton', 'cudnn'),
}
COUNTS = (
    'num_layers',
    'model_dim',
    'num_heads',
    'head_dim',
    'feed_forward_dim',
    'query_key_dim',
    'chunk_size',
    'normalizer_length',
    'relative_bias_length',
    'num_features',
    'projection_rank',
    'projection_length',
    'vocab_loss_slice',
)
# Up to here the relative bias is a Toeplitz table, beyond it is rotary (docs/paper.md section 2).
TOEPLITZ_LIMIT = 512


def default_config() -> ConfigDict:
    """Returns the model's config with nothing chosen but `name` and `size`; None means what these two say.

    Fields of every model:
      name: key of `architectures.ARCHITECTURES`.
      size: 'tiny', 'small', 'base' or 'large'; sets layers, width and heads (`architectures.SIZES`).
      num_layers: blocks: GAUs, or attention and feed-forward pairs.
      model_dim: D.
      norm: 'scale_norm' (default of GAU), 'layer_norm' (default of Transformers) or 'rms_norm'.
      norm_placement: 'pre' (default): x + f(norm(x)), one norm before the head; or 'post': norm(x + f(x)).
      absolute_position: 'sinusoid' (default, scaled by one learned number) or 'none'.
      rope: 'rotary' (default but for the plain Transformer) or 'none': queries and keys turned by position.
      dropout_rate: on embeddings and on what a layer adds to the residual stream; default 0.
      dtype: compute type 'bfloat16' (default), 'float32', or 'float64' for tests; parameters are float32 or better.
      layer_stack: 'unrolled' (default; faster) or 'scan' (compiles faster; layers must be alike).
      remat: what a block keeps for the backward pass: 'none' (default) means everything, 'full' its input only, 'dots'
        the results of matrix products, 'dots_no_batch' of those with weights only.
      impl: implementation of the attention: 'reference', 'xla', or on NVIDIA GPUs 'triton' (GAU models) and 'cudnn'
        (Transformers with softmax). 'auto' (default) takes the fastest that works where the model is built
        (`gau.models.implementations`).
      vocab_loss_slice: positions of a sequence scored against the vocabulary at once at most, in the loss;
        default 4096.

    Fields of some models; the others refuse them:
      num_heads: H. GAU models: default 1, divides E. Transformers: default D / 64.
      head_decay: alpha of heads that fall with depth, h(l) = max(1, ceil(H / (1 + alpha l))), l from 0; default 0.
      head_dim: Transformers: K, default D / H.
      gate: U. GAU: 'silu' (default) or 'none'. Transformers: 'none' (default) or 'silu', applied to attention's output.
      feed_forward: Transformers: 'gelu', 'geglu' or 'swiglu'; 'gelu' for transformer and transformer_plus [R].
      feed_forward_dim: Transformers: inner width, default 4 D for 'gelu' and 8/3 D for the gated ones.
      expansion_factor: GAU models: E / D, default 2.
      query_key_dim: GAU models: S, default 128.
      gamma_init: GAU models and MC-TFM++: 'normal' N(0, 0.02), or 'ones', which is the default where a GAU has no
        relative bias and where there is no local branch: the layer would be dead otherwise (docs/paper.md 7, trap 2).
      attention_function: 'relu2' (default of GAU), 'softmax' (default of Transformers), 'laplace', 'softplus2' or
        'smooth_relu2'.
      normalizer: n in f(q.k / n + b), not for softmax, which divides by sqrt(S). 'paper': length of the sequence (of
        the document, where they are packed; C in FLASH). 'fixed': `normalizer_length`. 'visible': keys the query sees.
        'su': f(q.k / sqrt(S) + b) / keys the query sees. Default 'paper', but 'fixed' for causal models with quadratic
        attention, where 'paper' lets later text change the result on a prefix.
      normalizer_length: the constant of 'fixed', default 512.
      temperature: 'none' (default), or 'learned': q.k times one learned number a layer.
      relative_bias: 'toeplitz' table or 'rotary' form or 'none'. GAU: 'toeplitz' up to 512 positions (FLASH: up to
        chunks of 512), else 'rotary'. Transformers: 'none'.
      relative_bias_length: positions that the table serves, default the context. (In chunks it is always C.)
      chunk_size: C, default 256. Combiner: tokens in a row, default the power of two at or above sqrt(context).
      branches: 'both' (default), 'local' or 'global'.
      global_reduction: 'mean' (default) or 'sum' over the visible tokens.
      feature_map: Performer: 'relu' (default) or 'favor', positive orthogonal random features.
      num_features: Performer: features of 'favor', default 256.
      projection_rank: Linformer: slots R, default 256 or the context, whichever is less.
      projection_length: Linformer: longest sequence, default the context.
    """
    config = ConfigDict()
    config.name = 'flash'
    config.size = 'base'
    for field in sorted(set(COUNTS) | set(ENUMS) | {'expansion_factor', 'head_decay', 'dropout_rate'}):
        kind = int if field in COUNTS else str if field in ENUMS else float
        config[field] = placeholder(kind)
    return config


def resolve(config: ConfigDict, *, causal: bool, context: int) -> ConfigDict:
    """Returns a copy of `config` with every field that applies filled in; the others stay None.

    Resolving a resolved config changes nothing.

    Args:
      config: as `default_config` returns it, with fields set.
      causal: whether later tokens are hidden from earlier ones, as a language model asks.
      context: tokens in a sequence, the longest the model is trained on.

    Raises:
      UserError: a field is unknown, has a wrong value, does not apply to the model or goes not with another.
    """
    config = config.copy_and_resolve_references()
    unknown = sorted(set(config) - set(default_config()))
    if unknown:
        raise UserError(f'model.{unknown[0]} does not exist{did_you_mean(unknown[0], default_config())}')
    _check_choice('model.name', config.name, ARCHITECTURES)
    _check_choice('model.size', config.size, SIZES)
    architecture = ARCHITECTURES[config.name]
    if causal and architecture.not_causal:
        raise UserError(f'model.name={config.name} cannot be a causal language model: {architecture.not_causal}')
    if context < 1:
        raise UserError(f'context must be at least 1, not {context}')
    _check_values(config)

    # A field whose meaning another one took away is treated like one the model never had.
    defaults = dict(architecture.defaults)
    void = _void_fields(config, defaults)
    for field in default_config():
        if field in ('name', 'size'):
            continue
        if field in void or field not in defaults:
            if config[field] is not None:
                reason = void.get(field) or _applies_to(field)
                raise UserError(f'model.{field}={config[field]} does not apply to {config.name}: {reason}')
            defaults.pop(field, None)

    # A config without open fields was resolved before; what stands there need not be anybody's choice for this context.
    resolved = all(config[field] is not None for field in defaults)
    chosen_reduction = None if resolved else config.global_reduction
    filled = _Filler(config, defaults)
    _fill_sizes(filled, architecture)
    _fill_attention(filled, architecture, causal=causal, context=context)
    for field, value in defaults.items():
        filled(field, value)
    _check_combinations(config, architecture, defaults, context)
    if causal and config.chunk_size is not None and config.chunk_size >= context:
        _check_one_chunk(config, context, chosen_reduction)
    return config


def heads_at(config: ConfigDict, layer: int) -> int:
    """Returns the heads of a layer, counted from 0, of a resolved config: max(1, ceil(H / (1 + alpha l)))."""
    return max(1, math.ceil(config.num_heads / (1 + (config.head_decay or 0.0) * layer)))


def head_dim_at(config: ConfigDict, layer: int) -> int:
    """Returns the width of a Transformer's heads in a layer of a resolved config: D / h(l) where heads fall, else K."""
    return config.model_dim // heads_at(config, layer) if config.head_decay else config.head_dim


def expanded_dim(config: ConfigDict) -> int:
    """Returns E of a resolved config of a GAU model."""
    return round(config.expansion_factor * config.model_dim)


class _Filler:
    """Sets fields that are still None and that apply."""

    def __init__(self, config: ConfigDict, defaults: dict[str, Any]):
        self.config, self.defaults = config, defaults

    def __call__(self, field: str, value: Any) -> None:
        if field in self.defaults and self.config[field] is None:
            self.config[field] = value


def _fill_sizes(fill: _Filler, architecture: Architecture) -> None:
    config, size = fill.config, SIZES[fill.config.size]
    fill('num_layers', size.gau_layers if architecture.family == 'gau' else size.gau_layers // 2)
    fill('model_dim', size.model_dim)
    if architecture.family == 'transformer':
        fill('num_heads', max(1, config.model_dim // HEAD_DIM))
        fill('feed_forward', architecture.defaults['feed_forward'])
        fill('feed_forward_dim', 4 * config.model_dim if config.feed_forward == 'gelu' else 8 * config.model_dim // 3)
        if not config.head_decay and config.head_dim is None:
            _check_divides('num_heads', config.num_heads, 'model_dim', config.model_dim)
            fill('head_dim', config.model_dim // config.num_heads)


def _fill_attention(fill: _Filler, architecture: Architecture, *, causal: bool, context: int) -> None:
    config, quadratic = fill.config, architecture.attention == 'quadratic'
    # A Combiner's rows are as long as there are rows, in powers of two.
    fill('chunk_size', architecture.defaults.get('chunk_size') or 2 ** math.ceil(math.log2(context) / 2))
    fill('projection_rank', min(256, context))
    fill('projection_length', context)
    fill('normalizer', 'fixed' if causal and quadratic else 'paper')
    if config.normalizer != 'fixed':
        fill.defaults.pop('normalizer_length', None)
    positions = context if quadratic else config.chunk_size
    if architecture.family == 'gau':
        fill('relative_bias', 'toeplitz' if positions <= TOEPLITZ_LIMIT else 'rotary')
        no_bias = config.relative_bias in (None, 'none')
        fill('gamma_init', 'ones' if no_bias else 'normal')
    else:
        fill('relative_bias', 'none')
        fill('gamma_init', 'ones' if config.branches == 'global' else 'normal')
    if config.relative_bias == 'toeplitz':
        fill('relative_bias_length', positions)
    else:
        fill.defaults.pop('relative_bias_length', None)


def _void_fields(config: ConfigDict, defaults: dict[str, Any]) -> dict[str, str]:
    """Fields of the model that mean nothing because of another field, with the reason."""
    void = {}
    if config.branches == 'global':
        local = ('attention_function', 'normalizer', 'normalizer_length', 'temperature')
        void |= dict.fromkeys((*local, 'relative_bias', 'relative_bias_length'), 'branches=global has no local branch')
    if config.branches == 'local':
        void['global_reduction'] = 'branches=local has no global branch'
        if 'feed_forward' in defaults:
            void['gamma_init'] = 'branches=local has no scale-and-offset transforms here'
    if 'feature_map' in defaults and config.feature_map != 'favor':
        void['num_features'] = 'it is the number of random features of feature_map=favor'
    if (config.attention_function or defaults.get('attention_function')) == 'softmax':
        void |= dict.fromkeys(('normalizer', 'normalizer_length'), 'softmax normalises by itself')
    if config.normalizer not in ('fixed', None):
        void['normalizer_length'] = f'it is the constant of normalizer=fixed, and this is {config.normalizer}'
    if config.relative_bias not in ('toeplitz', None):
        void['relative_bias_length'] = f'it is the length of a toeplitz table, and this is {config.relative_bias}'
    if config.head_decay and 'head_dim' in defaults:
        void['head_dim'] = 'with falling heads the width of a head is model_dim / heads of the layer'
    return void


def _check_values(config: ConfigDict) -> None:
    for field, options in ENUMS.items():
        if config[field] is not None:
            _check_choice(f'model.{field}', config[field], options)
    for field in COUNTS:
        if config[field] is not None and config[field] < 1:
            raise UserError(f'model.{field} must be at least 1, not {config[field]}')
    if config.expansion_factor is not None and not config.expansion_factor > 0:
        raise UserError(f'model.expansion_factor must be positive, not {config.expansion_factor}')
    if config.head_decay is not None and not config.head_decay >= 0:
        raise UserError(f'model.head_decay must be at least 0, not {config.head_decay}')
    if config.dropout_rate is not None and not 0 <= config.dropout_rate < 1:
        raise UserError(f'model.dropout_rate must be in [0, 1), not {config.dropout_rate}')


def _check_combinations(config: ConfigDict, architecture: Architecture, defaults: dict[str, Any], context: int) -> None:
    for field, value in defaults.items():
        if config[field] is None:
            raise AssertionError(f'{field} was left open (default {value}); an architecture table is incomplete')
    if config.impl not in ('auto', *architecture.impls):
        options = ', '.join(('auto', *architecture.impls))
        raise UserError(f'model.impl={config.impl} does not exist for {config.name}; choose from {options}')
    if config.absolute_position == 'sinusoid' and config.model_dim % 2:
        raise UserError(f'model.absolute_position=sinusoid needs an even model_dim, not {config.model_dim}')
    if config.layer_stack == 'scan' and config.head_decay:
        raise UserError('model.layer_stack=scan needs layers that are alike; set head_decay=0 or layer_stack=unrolled')
    served = {'projection_length': config.projection_length}
    if architecture.attention == 'quadratic':
        served['relative_bias_length'] = config.relative_bias_length
    for field, length in served.items():
        if length is not None and length < context:
            raise UserError(f'model.{field}={length} is too short for a context of {context}')
    if architecture.family == 'gau':
        _check_gau(config)
    else:
        _check_transformer(config)


def _check_one_chunk(config: ConfigDict, context: int, chosen_reduction: str | None) -> None:
    """Refuses what asks for earlier chunks where a causal model has none."""
    alone = f'model.chunk_size={config.chunk_size} makes one chunk of a context of {context}'
    if config.branches == 'global':
        raise UserError(f'{alone}: branches=global would see nothing; use a smaller chunk_size or branches=both')
    if chosen_reduction is not None:
        raise UserError(f'{alone}: global_reduction={chosen_reduction} changes nothing; use a smaller chunk_size')


def _check_gau(config: ConfigDict) -> None:
    expanded = config.expansion_factor * config.model_dim
    if abs(expanded - round(expanded)) > 1e-6:
        raise UserError(
            f'model.expansion_factor={config.expansion_factor} times model_dim={config.model_dim} is {expanded:g}; '
            'it must be a whole number'
        )
    _check_heads(config, 'E = expansion_factor * model_dim', round(expanded))
    _check_even(config, 'query_key_dim', config.query_key_dim)
    # relu of a q.k of order 1e-4 is no signal; the other functions do not start at 0 (trap 2).
    quadratic_only = config.branches in (None, 'local') and config.attention_function == 'relu2'
    if quadratic_only and config.relative_bias == 'none' and config.gamma_init == 'normal':
        raise UserError('model.gamma_init=normal without a relative_bias leaves the layer dead; use gamma_init=ones')


def _check_transformer(config: ConfigDict) -> None:
    if config.head_decay:
        _check_heads(config, 'model_dim', config.model_dim)
    for layer in range(config.num_layers):
        _check_even(config, 'head_dim', head_dim_at(config, layer))


def _check_heads(config: ConfigDict, what: str, width: int) -> None:
    for layer in range(config.num_layers if config.head_decay else 1):
        heads = heads_at(config, layer)
        if width % heads:
            where = f'layer {layer} has {heads} heads' if config.head_decay else f'model.num_heads={heads}'
            raise UserError(f'{where}, which does not divide {what} = {width}')


def _check_even(config: ConfigDict, field: str, value: int) -> None:
    if value % 2 and config.rope == 'rotary':
        raise UserError(f'model.{field}={value} is odd; RoPE rotates pairs: use an even number or rope=none')
    if value % 2 and config.relative_bias == 'rotary':
        raise UserError(f'model.{field}={value} is odd; relative_bias=rotary rotates pairs: use an even number')


def _check_divides(field: str, value: int, of_field: str, of_value: int) -> None:
    if of_value % value:
        raise UserError(f'model.{field}={value} does not divide model.{of_field}={of_value}')


def _check_choice(field: str, value: Any, options) -> None:
    if value not in options:
        raise UserError(f'{field}={value} does not exist{did_you_mean(value, options)}')


def _applies_to(field: str) -> str:
    names = [name for name, architecture in ARCHITECTURES.items() if field in architecture.defaults]
    return f'it is a field of {", ".join(names)}'
