"""How large a gated unit's scores, bias, weights and output are, layer by layer, while it trains."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.data import pipeline
from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.models.attentions.mixed_chunk import MixedChunk
from gau.models.attentions.quadratic import Quadratic
from gau.models.families.gated_unit import GatedUnit
from gau.objectives import objective as objectives
from gau.ops.masks import document_length, visibility_mask
from gau.ops.positions import bias_matrix
from gau.ops.scores import SOFTMAX_PLUS_KEYS, Scoring, attention_weights
from gau.training import mesh as meshes
from gau.training.batches import put_batch
from gau.training.setup import Run

# What is measured in each layer; every weight is between a query and a key that it sees, of FLASH's local branch.
SIZES = {
    'residual': 'root mean square of the residual stream that the layer reads',
    'output': 'root mean square of what the layer adds to it',
    'score': 'root mean square of q.k / n',
    'bias': 'root mean square of b',
    'weight_sum': 'sum of the weights of a query, mean over queries',
    'dead': 'share of weights that are exactly 0, and have no gradient',
    'global_sum': 'the same of the global branch: mean of |q.k| over the keys that it reads, mean over queries',
}
# Of the parameters' paths: the modules whose inputs or results are looked at.
_NORM, _UNIT, _QUERY_KEY, _BIAS = 'norm', 'gau', 'query_key', 'relative_bias'


def check(config: Any) -> None:
    """Raises UserError if a resolved config has no gated units that can be looked into."""
    for field in ('fork', 'init_from'):
        if config[field] is not None:
            raise UserError(f'{field}={config[field]} does nothing here: layers are looked into from the first step on')
    model = config.model
    family, attention, _ = ARCHITECTURES[model.name]
    if not isinstance(family, GatedUnit):
        raise UserError(f'model.name={model.name} has no gated units')
    if not isinstance(attention, Quadratic | MixedChunk):
        raise UserError(f'model.name={model.name}: only the attention of flash and flash_quad can be looked into')
    if model.branches == 'global':
        raise UserError('model.branches=global has no weights between tokens')
    wanted = {'layer_stack': 'unrolled', 'temperature': 'none', 'norm_placement': 'pre', 'impl': 'xla'}
    for field, value in wanted.items():
        if model[field] != value:
            raise UserError(f'model.{field}={model[field]}: the layers can be looked into with {value} only')
    if model.chunk_size and config.data.context % model.chunk_size:
        raise UserError(f'data.context={config.data.context} is no multiple of model.chunk_size={model.chunk_size}')


def while_training(run: Run, steps: Sequence[int]) -> Iterator[tuple[int, float, dict[str, Array]]]:
    """Trains up to the last of `steps`; yields at each of them (step, loss, sizes), on the batch trained on next.

    The sizes are arrays with a number for each layer, under the names of `SIZES`; a model without a bias has none.
    """
    iterator = pipeline.train_iterator(
        run.config.data, objective=run.config.objective, tokenizer=run.tokenizer, seed=run.config.seed
    )
    sharding, state, train_step = meshes.batch_sharding(run.mesh), run.init_state(), run.train_step()
    with run.context():
        measured = jax.jit(sizes_of(run.model, run.config))
        for step in range(max(steps) + 1):
            batch = put_batch(next(iterator), sharding)
            found = jax.device_get(measured(state.params, batch)) if step in steps else None
            state, metrics = train_step(state, batch)
            if found is not None:
                yield step, float(metrics['loss']), found


def sizes_of(model: nn.Module, config: Any) -> Callable[[Any, dict[str, Array]], dict[str, Array]]:
    """Returns (params, batch) -> sizes, pure, for a model of a config that passed `check`."""

    def measure(params: Any, batch: dict[str, Array]) -> dict[str, Array]:
        seen: dict[str, dict[str, Any]] = {}

        def look(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            result = call(*args, **kwargs)
            path = context.module.path
            if context.method_name == '__call__' and len(path) > 1 and path[-1] in (_NORM, _UNIT, _QUERY_KEY, _BIAS):
                seen.setdefault(path[0], {})[path[-1]] = args[0] if path[-1] == _NORM else result
            return result

        with nn.intercept_methods(look):
            model.apply(
                {'params': params},
                batch['inputs'],
                segment_ids_BN=batch.get('segment_ids'),
                positions_BN=batch.get('positions'),
            )
        ids_BN = batch.get('segment_ids', jnp.ones_like(batch['inputs']))
        layers = [_layer_sizes(own, ids_BN, config) for own in seen.values()]
        return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}

    return measure


def _layer_sizes(seen: dict[str, Any], ids_BN: Array, config: Any) -> dict[str, Array]:
    model, n = config.model, config.data.context
    causal = objectives.load(config.objective).causal
    c = min(model.chunk_size or n, n)
    window = model.local_window if model.local_window and n > c else 1
    q_BHGCS, k_BHGMS = (x.reshape(*x.shape[:2], n // c, c, -1).astype(jnp.float32) for x in seen[_QUERY_KEY][:2])
    ids_BGC = ids_BGM = ids_BN.reshape(len(ids_BN), n // c, c)
    if window == 2:
        # Before the first chunk stands padding, which no query sees.
        k_BHGMS = jnp.concatenate([jnp.pad(k_BHGMS[:, :, :-1], [(0, 0)] * 2 + [(1, 0)] + [(0, 0)] * 2), k_BHGMS], 3)
        ids_BGM = jnp.concatenate([jnp.pad(ids_BGC[:, :-1], ((0, 0), (1, 0), (0, 0))), ids_BGC], axis=2)
    m, before = window * c, (window - 1) * c
    mask = visibility_mask(ids_BGC, ids_BGM, n=c, m=m, causal=causal, first_query=before)[:, None]
    lengths_BGC1 = jnp.full((1, 1, 1, 1), m) if model.chunk_size else document_length(ids_BN)[:, None, :, None]
    scoring = Scoring(model.attention_function, model.normalizer, model.normalizer_length or 512)
    bias = None
    if _BIAS in seen:
        bias_HMM = jax.vmap(lambda bias_P: bias_matrix(bias_P, m, m))(seen[_BIAS].astype(jnp.float32))
        bias = bias_HMM[None, :, None, before:]
    weights = attention_weights(
        *(q_BHGCS, k_BHGMS), scoring=scoring, sequence_length=lengths_BGC1[:, None], mask=mask, bias=bias
    )
    scores = jnp.einsum('...qs,...ks->...qk', q_BHGCS, k_BHGMS) * _scale(scoring, q_BHGCS, mask, lengths_BGC1[:, None])
    real_BN = ids_BN > 0
    sizes = {
        'residual': _rms(jax.tree.leaves(seen[_NORM])[0], real_BN[..., None]),
        'output': _rms(jax.tree.leaves(seen[_UNIT])[0], real_BN[..., None]),
        'score': _rms(scores, mask),
        'weight_sum': _mean(weights.sum(-1), mask.any(-1)),
        'dead': _mean(weights == 0, mask),
    }
    if bias is not None:
        sizes['bias'] = _rms(bias, mask)
    if model.branches == 'both':
        sizes['global_sum'] = _global_sum(
            *seen[_QUERY_KEY][2:4], ids_BN, c, (model.local_window or 1) if causal else None
        )
    return {name: sizes[name] for name in SIZES if name in sizes}


def _global_sum(q_lin_BHNS: Array, k_lin_BHNS: Array, ids_BN: Array, c: int, window: int | None) -> Array:
    """Mean of |q.k| in the global branch, the gate left out; without a window every token is read."""
    chunk = jnp.arange(ids_BN.shape[1]) // c
    mask_BNN = visibility_mask(ids_BN, ids_BN, n=len(chunk), m=len(chunk), causal=False)
    if window is not None:
        mask_BNN &= chunk[:, None] >= chunk + window
    qk_BHNN = jnp.einsum('BHNS,BHMS->BHNM', q_lin_BHNS.astype(jnp.float32), k_lin_BHNS.astype(jnp.float32))
    sums_BHN = jnp.mean(jnp.abs(qk_BHNN), axis=-1, where=mask_BNN[:, None])
    return _mean(sums_BHN, mask_BNN.any(-1)[:, None])


def _scale(scoring: Scoring, q: Array, mask: Array, lengths: Array) -> Array | float:
    """What q.k is multiplied by before the bias is added."""
    if scoring.function == 'softmax' or scoring.normalizer == 'su':
        return q.shape[-1] ** -0.5
    if scoring.function == 'softmax_plus':
        return q.shape[-1] ** -0.5 / math.log(SOFTMAX_PLUS_KEYS) * jnp.log(jnp.maximum(mask.sum(-1, keepdims=True), 1))
    if scoring.normalizer == 'fixed':
        return 1 / scoring.length
    return 1 / jnp.maximum(mask.sum(-1, keepdims=True) if scoring.normalizer == 'visible' else lengths, 1)


def _mean(x: Array, mask: Array) -> Array:
    return jnp.mean(x.astype(jnp.float32), where=jnp.broadcast_to(mask, x.shape))


def _rms(x: Array, mask: Array) -> Array:
    shape = jnp.broadcast_shapes(x.shape, mask.shape)
    return jnp.sqrt(_mean(jnp.broadcast_to(jnp.square(x.astype(jnp.float32)), shape), mask))
