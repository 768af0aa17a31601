"""What a model of `modeling_gau.py` is."""

from transformers import PretrainedConfig

# Fields of the config, by what they belong to, with the values of a FLASH of base size.
FIELDS = {
    **dict(architecture='flash', is_causal=True, vocab_size=32_000, context=512, num_layers=24, model_dim=768),
    **dict(output_layer='tied', short_convolution=0),
    **dict(num_heads=1, norm='scale_norm', norm_placement='pre', dropout_rate=0.0, gate='silu'),
    **dict(absolute_position='sinusoid', rope='rotary', relative_bias='toeplitz', relative_bias_length=256),
    **dict(attention_function='relu2', normalizer='paper', normalizer_length=None, learned_temperature=False),
    **dict(chunk_size=256, branches='both', global_reduction='mean'),  # mixed chunk attention
    **dict(expanded_dim=1536, query_key_dim=128, key_input='shared'),  # gated attention units
    **dict(decay_gate='none', local_window=1),  # of both
    **dict(head_dim=None, feed_forward=None, feed_forward_dim=None),  # Transformers
}


class GAUConfig(PretrainedConfig):
    """What the model is; a field that does not apply is None. The repository's docs/models.md says what each means."""

    model_type = 'gau'
    attribute_map = {  # noqa: RUF012
        'hidden_size': 'model_dim',
        'num_hidden_layers': 'num_layers',
        'num_attention_heads': 'num_heads',
        'max_position_embeddings': 'context',
    }

    def __init__(self, **kwargs):
        for name, default in FIELDS.items():
            setattr(self, name, kwargs.pop(name, default))
        super().__init__(**kwargs)
