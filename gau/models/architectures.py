"""The models by name, and the sizes: tables without code. A new architecture is a new entry here.

An entry says what a block is made of and gives the default of every field that means something for the model; a field
without a default does not apply to it and is refused where somebody sets it.
"""

from types import MappingProxyType
from typing import Any, NamedTuple

# Fields of every model. None: depends on size, causality or context, filled by `resolve`.
_COMMON = {
    'num_layers': None,
    'model_dim': None,
    'norm_placement': 'pre',
    'absolute_position': 'sinusoid',
    'rope': 'rotary',
    'dropout_rate': 0.0,
    'dtype': 'bfloat16',
    'layer_stack': 'unrolled',
    'remat': 'none',
    'impl': 'auto',
    'vocab_loss_slice': 4096,
}
_GAU = _COMMON | {
    'norm': 'scale_norm',
    'expansion_factor': 2.0,
    'query_key_dim': 128,
    'num_heads': 1,
    'head_decay': 0.0,
    'gate': 'silu',
    'gamma_init': None,
    'attention_function': 'relu2',
    'normalizer': None,
    'normalizer_length': 512,
    'temperature': 'none',
    'relative_bias': None,
    'relative_bias_length': None,
}
_CHUNKED = {'chunk_size': 256, 'branches': 'both', 'global_reduction': 'mean'}
_TRANSFORMER = _COMMON | {
    'norm': 'layer_norm',
    'num_heads': None,
    'head_decay': 0.0,
    'head_dim': None,
    'gate': 'none',
    'feed_forward': 'geglu',
    'feed_forward_dim': None,
}
_SOFTMAX = {
    'attention_function': 'softmax',
    'normalizer': None,
    'normalizer_length': 512,
    'temperature': 'none',
    'relative_bias': 'none',
    'relative_bias_length': None,
}
_FUSED = ('cudnn', 'xla', 'reference')


class Architecture(NamedTuple):
    """One model.

    Attributes:
      family: 'gau' (one unit a block) or 'transformer' (attention and feed-forward a block).
      attention: 'quadratic', 'mixed_chunk', 'performer', 'linformer' or 'combiner'.
      defaults: default of every field that applies.
      impls: implementations its attention has, fastest first: 'auto' takes the first that works (`implementations`).
      not_causal: None, or why the model cannot be causal.
    """

    family: str
    attention: str
    defaults: dict[str, Any]
    impls: tuple[str, ...] = ('xla', 'reference')
    not_causal: str | None = None


ARCHITECTURES = MappingProxyType(
    {
        'flash_quad': Architecture('gau', 'quadratic', _GAU, impls=('triton', 'xla', 'reference')),
        'flash': Architecture('gau', 'mixed_chunk', _GAU | _CHUNKED, impls=('triton', 'xla', 'reference')),
        'transformer': Architecture(
            'transformer', 'quadratic', _TRANSFORMER | _SOFTMAX | {'feed_forward': 'gelu', 'rope': 'none'}, _FUSED
        ),
        'transformer_plus': Architecture(
            'transformer', 'quadratic', _TRANSFORMER | _SOFTMAX | {'feed_forward': 'gelu'}, _FUSED
        ),
        'transformer_plus_plus': Architecture('transformer', 'quadratic', _TRANSFORMER | _SOFTMAX, _FUSED),
        'mc_transformer_plus_plus': Architecture(
            'transformer', 'mixed_chunk', _TRANSFORMER | _SOFTMAX | _CHUNKED | {'gamma_init': None}
        ),
        'performer': Architecture(
            'transformer', 'performer', _TRANSFORMER | {'feature_map': 'relu', 'num_features': 256}
        ),
        'linformer': Architecture(
            'transformer',
            'linformer',
            _TRANSFORMER | {'projection_rank': None, 'projection_length': None},
            not_causal='it mixes the whole sequence into every slot that a token attends to; train it as mlm',
        ),
        'combiner': Architecture('transformer', 'combiner', _TRANSFORMER | {'chunk_size': None}, impls=('reference',)),
    }
)


class Size(NamedTuple):
    """A size of the family: what two GAU layers are to one Transformer layer, E = 2D is to heads of 64 and 8/3 D.

    Attributes:
      model_dim: D.
      gau_layers: layers of FLASH and FLASH-Quad; Transformers have half as many.
      parameters: parameters of named models with a tied vocabulary of 32,000 (FLASH-Quad with the rotary bias it has
        beyond a context of 512). 'tiny' has 1 M beside its embedding, 'base' is the paper's 110 M and 'large' the 500 M
        it trained on PG-19. A test checks the numbers against the closed form and the built models.
    """

    model_dim: int
    gau_layers: int
    parameters: dict[str, int]


HEAD_DIM = 64

SIZES = MappingProxyType(
    {
        'tiny': Size(192, 4, {'flash_quad': 7_134_470, 'flash': 7_137_538, 'transformer_plus_plus': 7_034_625}),
        'small': Size(384, 12, {'flash_quad': 23_528_462, 'flash': 23_537_666, 'transformer_plus_plus': 22_938_625}),
        'base': Size(768, 24, {'flash_quad': 111_983_642, 'flash': 112_002_050, 'transformer_plus_plus': 109_644_289}),
        'large': Size(
            1536, 32, {'flash_quad': 508_702_754, 'flash': 508_727_298, 'transformer_plus_plus': 502_492_161}
        ),
    }
)
