"""The second oracle: FLASH-pytorch 0.1.9, another hand's FLASH (docs/paper.md section 8).

Bidirectional it computes section 3 exactly, once it is given our rotation and our bias. Causal it sums the means of
past chunks where the paper takes the mean over all of their tokens: a sum over tokens divided by C.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.layers.common import TokenInfo
from gau.layers.gated_attention_unit import GatedAttentionUnit
from gau.layers.mixed_chunk import MixedChunkCore
from gau.ops.positions import bias_matrix, rope_table, toeplitz_bias
from tests.numerics import normal, random_like

torch = pytest.importorskip('torch', reason='the oracle needs torch, which is no requirement of this repository')
if 'rotary_embedding_torch' not in sys.modules:
    # Imported there, and not used once we hand over our rotation: a stand-in saves one more package.
    sys.modules['rotary_embedding_torch'] = types.ModuleType('rotary_embedding_torch')
    sys.modules['rotary_embedding_torch'].RotaryEmbedding = None
flash_pytorch = pytest.importorskip('flash_pytorch', reason='the oracle is FLASH-pytorch==0.1.9; it is not installed')

N, D, C, S = 20, 6, 5, 4


class Rotation:
    """Our RoPE in the place of theirs."""

    def rotate_queries_or_keys(self, x):
        n = x.shape[-2]
        table = rope_table(jnp.arange(n)[None], x.shape[-1], dtype=jnp.float64)
        cos, sin = (torch.tensor(np.asarray(t[0])) for t in table)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


@pytest.mark.parametrize('causal', [False, True])
def test_unit_equals_flash_pytorch(causal):
    core = MixedChunkCore(
        causal=causal,
        impl='xla',
        dtype='float64',
        width=S,
        relative_bias='toeplitz',
        relative_bias_length=C,
        chunk_size=C,
        global_reduction='sum' if causal else 'mean',
    )
    module = GatedAttentionUnit(core, expanded_dim=2 * D, query_key_dim=S, dtype='float64')
    positions = jnp.arange(N)[None]
    info = TokenInfo(None, positions, {S: rope_table(positions, S, dtype=jnp.float64)})
    x = normal(1, 2, N, D)
    params = random_like(jax.eval_shape(module.init, jax.random.key(0), x, info)['params'], 0)

    theirs = flash_pytorch.FLASH(
        dim=D, group_size=C, query_key_dim=S, expansion_factor=2.0, causal=causal, rotary_pos_emb=Rotation(),
        shift_tokens=False,
    ).double().eval()  # fmt: skip
    ours = {name: torch.tensor(np.asarray(value)) for name, value in {
        'vu': params['uv']['kernel'][:, ::-1].reshape(D, -1).T,
        'vu_bias': params['uv']['bias'][::-1].reshape(-1),
        'z': params['z']['kernel'].T,
        'z_bias': params['z']['bias'],
        'out': params['out']['kernel'].T,
        'out_bias': params['out']['bias'],
        # Their order is quadratic query, linear query, quadratic key, linear key.
        'gamma': params['query_key']['gamma'][jnp.array([0, 2, 1, 3]), 0],
        'beta': params['query_key']['beta'][jnp.array([0, 2, 1, 3]), 0],
        'bias': bias_matrix(toeplitz_bias(params['relative_bias']['table'][0], C), C, C),
    }.items()}  # fmt: skip

    class Bias(torch.nn.Module):
        def forward(self, sim):
            return ours['bias']

    if causal:
        ours['gamma'][1] *= C
        ours['beta'][1] *= C
    with torch.no_grad():
        theirs.norm = torch.nn.Identity()
        theirs.rel_pos_bias = Bias()
        for layer, name in ((theirs.to_hidden[0], 'vu'), (theirs.to_qk[0], 'z'), (theirs.to_out, 'out')):
            layer.weight.copy_(ours[name])
            layer.bias.copy_(ours[f'{name}_bias'])
        theirs.qk_offset_scale.gamma.copy_(ours['gamma'])
        theirs.qk_offset_scale.beta.copy_(ours['beta'])
        expected = theirs(torch.tensor(np.asarray(x))).numpy() - np.asarray(x)
    np.testing.assert_allclose(module.apply({'params': params}, x, info), expected, atol=1e-12)
