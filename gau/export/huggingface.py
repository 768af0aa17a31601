"""`--format=huggingface`: a directory that `AutoModelForCausalLM` or `AutoModelForMaskedLM` opens, without JAX."""

import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.export import card, fast_tokenizer
from gau.export.exporting import CONFIG, Trained, write_json, write_weights
from gau.models.architectures import ARCHITECTURES
from gau.models.attentions.scored import ScoredAttention
from gau.models.widths import expanded_dim

# What an exported directory has of this one. `transformers` copies the files that modeling_gau.py imports by `from .`.
_PARTS = ('modeling', 'blocks', 'attention', 'layers', 'configuration')
CODE = tuple(Path(__file__).with_name(f'{part}_gau.py') for part in _PARTS)
# Fields of `model` that GAUConfig has by the same name; the others only say how parameters start and what computes.
FIELDS = (
    *('num_layers', 'model_dim', 'num_heads', 'norm', 'norm_placement', 'absolute_position', 'rope'),
    *('dropout_rate', 'gate', 'query_key_dim', 'key_input', 'head_dim', 'feed_forward', 'feed_forward_dim'),
    *('attention_function', 'normalizer', 'normalizer_length'),
    *('relative_bias', 'relative_bias_length', 'chunk_size', 'branches', 'global_reduction', 'decay_gate'),
    *('local_window', 'short_convolution', 'output_layer'),
)
NOT_OF_THE_MODEL = {
    *('name', 'size', 'dtype', 'impl', 'layer_stack', 'remat', 'vocab_loss_slice'),
    'temperature',  # a bool there: `transformers` takes the name for a field of sampling
    *('gamma_init', 'relative_bias_init', 'relative_bias_scale', 'expansion_factor'),
}
# Fields of which the exported code has one value.
AS_EVER = {'far_chunks': 0}

USE = """\
```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('DIRECTORY', trust_remote_code=True)
model = {auto}.from_pretrained('DIRECTORY', trust_remote_code=True)
{call}
```

Needed are torch and transformers 5.24 or newer; the whole model is in `modeling_gau.py` and the files that it
imports, beside this card. Documents in one row: `segment_ids`, 0 at padding, else the document's number.
"""
CALLS = {
    True: "print(tokenizer.decode(model.generate(**tokenizer('It was', return_tensors='pt'), max_new_tokens=50)[0]))",
    False: "logits = model(**tokenizer('It was', return_tensors='pt')).logits",
}


def write(trained: Trained, directory: Path) -> None:
    """Writes the format into a directory.

    Raises:
      UserError: see `config_of` and `fast_tokenizer.write`.
    """
    run, tokenizer = trained.run, trained.run.tokenizer
    config = config_of(
        run.config.model, vocab_size=tokenizer.vocab_size, causal=trained.causal, context=run.config.data.context
    )
    special = {f'{name}_token_id': getattr(tokenizer, f'{name}_id') for name in ('bos', 'eos', 'pad')}
    write_weights(trained, directory)
    write_json(directory / CONFIG, config | special)
    if trained.causal:
        write_json(directory / 'generation_config.json', special | {'use_cache': has_state(config)})
    for path in CODE:
        shutil.copyfile(path, directory / path.name)
    fast_tokenizer.write(tokenizer, directory, context=run.config.data.context, causal=trained.causal)
    auto = 'AutoModelForCausalLM' if trained.causal else 'AutoModelForMaskedLM'
    use = USE.format(auto=auto, call=CALLS[trained.causal])
    card.write(trained, directory, format='huggingface', use=use, library='transformers')


def has_state(config: dict[str, Any]) -> bool:
    """Returns whether modeling_gau.py has a state for decoding; else `generate` reads everything again."""
    return config['is_causal'] and (config['chunk_size'] is not None or config['normalizer'] != 'paper')


def config_of(model: ConfigDict, *, vocab_size: int, causal: bool, context: int) -> dict[str, Any]:
    """Returns config.json, as the class GAUConfig of modeling_gau.py reads it.

    Args:
      model: resolved model config.
      vocab_size: V.
      causal: whether it predicts the next token.
      context: tokens of a sequence in training.

    Raises:
      UserError: the model is none of those that modeling_gau.py has.
    """
    attention = ARCHITECTURES[model.name].attention
    if not isinstance(attention, ScoredAttention):
        held = [name for name, entry in ARCHITECTURES.items() if isinstance(entry.attention, ScoredAttention)]
        raise UserError(
            f'model.name={model.name} cannot be exported to PyTorch or ONNX: its attention is not written in '
            f'gau/export/attention_gau.py, which holds {", ".join(held)}; --format=safetensors has the weights alone'
        )
    known = {*FIELDS, *NOT_OF_THE_MODEL}
    unknown = {name for name in model if name not in known and model[name] not in (None, AS_EVER.get(name))}
    if unknown:
        field = min(unknown)
        raise UserError(
            f'model.{field}={model[field]} is not known to gau/export/configuration_gau.py: it cannot be exported'
        )
    name = 'GAUForCausalLM' if causal else 'GAUForMaskedLM'
    auto = 'AutoModelForCausalLM' if causal else 'AutoModelForMaskedLM'
    module = CODE[0].stem
    return {
        'model_type': 'gau',
        'architectures': [name],
        'auto_map': {'AutoConfig': f'{module}.GAUConfig', auto: f'{module}.{name}'},
        'architecture': model.name,
        'is_causal': causal,
        'vocab_size': vocab_size,
        'context': context,
        'expanded_dim': expanded_dim(model) if model.expansion_factor else None,
        'learned_temperature': model.temperature == 'learned',
        'dtype': 'float32',
        **{field: model[field] for field in FIELDS},
    }
