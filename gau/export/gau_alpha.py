"""GAU-alpha's layout as an export of ours: a BERT made of softmax GAUs, to start a run from.

The layout is that of the package `gau-alpha` (`config.json` with `model_type` gau_alpha and `model.safetensors`, or
`pytorch_model.bin`, which needs torch). A GAU-alpha model is our `flash_quad` with softmax, or with its form that grows
sharper with the length, after-norms without parameters and no relative bias:

    theirs                                        ours
    i_dense.weight [2 E + S, D]                   uv [2 E, D], z [S, D]
    q_scaleoffset, k_scaleoffset [S]              query_key gamma [2, 1, S]
    pairs (2 i, 2 i + 1) are rotated              pairs (i, i + S/2): z, gamma and beta are sorted anew
    norm(word + token type 0)                     the rows of the embedding, computed once
    cls.predictions.decoder.weight [V, D]         output [V, D]: output_layer=own

Their output layer is the words without that norm, unless the file has another one. Token type 1 has no place here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gau import outputs
from gau.errors import UserError
from gau.export.exporting import CARD, CONFIG, KIND, TRAINING_CONFIG, WEIGHTS, write_json

# Their values of a field -> our model's.
NORMALIZATIONS = {
    'softmax': {'attention_function': 'softmax'},
    'softmax_plus': {'attention_function': 'softmax_plus'},
    'squared_relu': {'attention_function': 'relu2', 'normalizer': 'su'},
}
REQUIRED = {'model_type': ('gau_alpha',), 'hidden_act': ('swish', 'silu'), 'attention_scale': (True,)}
DEFAULTS = {
    'hidden_act': 'swish',
    'attention_scale': True,
    'normalization': 'softmax_plus',
    'layer_norm_eps': 1e-12,
    'max_position_embeddings': 512,
}

CARD_TEXT = """\
# Imported from GAU-alpha

`model.safetensors` has {source} by our names, `config.json` the model's config. Hidden states and logits of masked
tokens equal the original's (see gau/export/gau_alpha.py). A run starts from it with
`--config=configs/finetune.py:start=DIRECTORY`.
"""


def convert(source: Path, output: Path, *, tokenizer: str) -> dict[str, Any]:
    """Writes a GAU-alpha model as a directory that `init_from` takes.

    Args:
      source: directory of the model.
      output: directory to make.
      tokenizer: as `data.tokenizer`: the model's vocabulary as `huggingface:TOKENIZER_JSON`.

    Returns:
      The model's config in our fields.

    Raises:
      UserError: something is there, a library or a file is missing, or the model is none that we have.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError('safetensors is missing: pip install -r requirements-export.txt') from error
    outputs.check_directory(output)
    config = _read_config(source)
    weights = _read_weights(source)
    model = model_of(config, where=str(source))
    named = parameters(weights, config, where=str(source))
    vocab_size = _check_tokenizer(tokenizer, named['embedding.weight'].shape[0])
    context = config['max_position_embeddings']
    common = {'objective': 'mlm', 'causal': False, 'context': context, 'vocab_size': vocab_size, 'model': model}
    data = {'tokenizer': tokenizer, 'context': context}
    with outputs.directory(output) as aside:
        save_file(named, aside / WEIGHTS, metadata={'format': 'pt'})
        write_json(aside / CONFIG, {'format': KIND, **common})
        write_json(aside / TRAINING_CONFIG, {'objective': 'mlm', 'model': model, 'data': data})
        (aside / CARD).write_text(CARD_TEXT.format(source=source.name), encoding='utf-8')
    return model


def model_of(config: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Returns the section `model` for a GAU-alpha config.

    Raises:
      UserError: a field with a value that has no counterpart.
    """
    for field, allowed in REQUIRED.items():
        if config.get(field) not in allowed:
            raise UserError(f'{where}: {field}={config.get(field)} has no counterpart here, only {allowed[0]} has')
    if config['normalization'] not in NORMALIZATIONS:
        raise UserError(
            f'{where}: normalization={config["normalization"]} has no counterpart here, only '
            f'{", ".join(NORMALIZATIONS)} have'
        )
    width, embedded = config['hidden_size'], config.get('embedding_size') or config['hidden_size']
    if embedded != width:
        raise UserError(f'{where}: embedding_size={embedded} beside hidden_size={width} has no counterpart here')
    return {
        'name': 'flash_quad',
        'num_layers': config['num_hidden_layers'],
        'model_dim': width,
        'expansion_factor': config['intermediate_size'] / width,
        'query_key_dim': config['attention_key_size'],
        'num_heads': 1,
        'norm': 'scale_norm',
        'norm_placement': 'post',
        'absolute_position': 'none',
        'output_layer': 'own',
        'rope': 'rotary',
        'relative_bias': 'none',
        'gate': 'silu',
        'gamma_init': 'ones',
        'key_input': 'shared',
        **NORMALIZATIONS[config['normalization']],
    }


def parameters(weights: dict[str, np.ndarray], config: dict[str, Any], *, where: str) -> dict[str, np.ndarray]:
    """Returns the parameters by our stable names (`gau.models.weights`), float32.

    Raises:
      UserError: a weight is missing or has another shape than the config says.
    """
    d, e, s = (config[name] for name in ('hidden_size', 'intermediate_size', 'attention_key_size'))

    def take(name: str, *shape: int, otherwise: float | np.ndarray | None = None) -> np.ndarray:
        found = next((weights[full] for full in (name, f'gau_alpha.{name}') if full in weights), None)
        if found is None and otherwise is not None:
            return np.full(shape, otherwise, np.float32)
        if found is None or found.shape != shape:
            there = 'absent' if found is None else list(found.shape)
            raise UserError(f'{where}: {name} is {there} there, and {list(shape)} by its config')
        return found.astype(np.float32)

    words = take('embeddings.word_embeddings.weight', config['vocab_size'], d)
    types = take('embeddings.token_type_embeddings.weight', config['type_vocab_size'], d)
    rows = (words + types[0]).astype(np.float64)
    scale = np.sqrt(np.square(rows).mean(-1, keepdims=True) + config['layer_norm_eps'])
    decoder = take('cls.predictions.decoder.weight', *words.shape, otherwise=words)
    named = {'embedding.weight': (rows / scale).astype(np.float32), 'output.weight': decoder}
    # Their halves of a rotated vector are its even and its odd places.
    order = np.concatenate([np.arange(0, s, 2), np.arange(1, s, 2)])
    for layer in range(config['num_hidden_layers']):
        theirs, ours = f'encoder.layer.{layer}.gau', f'blocks.{layer}.gau'
        weight = take(f'{theirs}.i_dense.weight', 2 * e + s, d)
        bias = take(f'{theirs}.i_dense.bias', 2 * e + s, otherwise=0)
        named |= {
            f'{ours}.uv.weight': weight[: 2 * e].copy(),
            f'{ours}.uv.bias': bias[: 2 * e].copy(),
            f'{ours}.z.weight': weight[2 * e :][order],
            f'{ours}.z.bias': bias[2 * e :][order],
            f'{ours}.out.weight': take(f'{theirs}.o_dense.weight', d, e),
            f'{ours}.out.bias': take(f'{theirs}.o_dense.bias', d, otherwise=0),
            f'blocks.{layer}.norm.scale': np.ones((), np.float32),
        }
        for name, kind, otherwise in (('gamma', 'weight', None), ('beta', 'bias', 0)):
            pair = [take(f'{theirs}.{role}_scaleoffset.{kind}', s, otherwise=otherwise)[order] for role in 'qk']
            named[f'{ours}.query_key.{name}'] = np.stack(pair)[:, None]
    return named


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / CONFIG).read_text(encoding='utf-8'))
        config = {**DEFAULTS, **config}
        for field in ('vocab_size', 'hidden_size', 'intermediate_size', 'attention_key_size', 'num_hidden_layers'):
            config[field] = int(config[field])
        config['type_vocab_size'] = int(config.get('type_vocab_size', 2))
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--source={source} is no directory of a GAU-alpha model: {CONFIG}: {error}') from error


def _read_weights(source: Path) -> dict[str, np.ndarray]:
    path, older = source / WEIGHTS, source / 'pytorch_model.bin'
    if path.is_file():
        from safetensors.numpy import load_file

        read = load_file
    elif older.is_file():
        try:
            import torch
        except ImportError as error:
            raise UserError(f'{older} needs torch: pip install -r requirements-export.txt') from error
        path = older

        def read(path: Path) -> dict[str, np.ndarray]:
            return {name: x.float().numpy() for name, x in torch.load(path, weights_only=True).items()}
    else:
        raise UserError(f'--source={source} has neither {WEIGHTS} nor {older.name}')
    try:
        return read(path)
    except Exception as error:  # The libraries promise no type.
        raise UserError(f'{path} cannot be read ({str(error).splitlines()[0]})') from error


def _check_tokenizer(spec: str, rows: int) -> int:
    from gau.data import tokenizers

    size = tokenizers.load(spec).vocab_size
    if size != rows:
        raise UserError(f'--tokenizer={spec} has {size} tokens and the embedding {rows}')
    return size
