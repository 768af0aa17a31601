"""The blocks of `modeling_gau.py`: gated attention units, and the Transformer's attention and feed-forward."""

import torch.nn.functional as F
from torch import Tensor, nn

from .attention_gau import Attention
from .configuration_gau import GAUConfig
from .layers_gau import KeyShift, Norm, ScaleOffset, ShortConvolution, Tokens, rotate


def split_heads(x_BNE: Tensor, heads: int) -> Tensor:
    """[B, N, E] as [B, H, N, E / H]."""
    return x_BNE.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHNE: Tensor) -> Tensor:
    """[B, H, N, E / H] as [B, N, E]."""
    return x_BHNE.transpose(1, 2).flatten(2)


class GatedAttentionUnit(Attention):
    """O = (U * (A V)) Wo, with U, V and Z = silu(X W), and queries and keys made of Z."""

    def __init__(self, config: GAUConfig):
        heads, d, e, s = config.num_heads, config.model_dim, config.expanded_dim, config.query_key_dim
        super().__init__(config, heads, s)
        self.uv = nn.Linear(d, (1 + (config.gate == 'silu')) * e)
        self.z = nn.Linear(d, s)
        if config.key_input == 'own':
            self.z_key = nn.Linear(d, s)
        elif config.key_input == 'shifted':
            self.key_shift = KeyShift(s)
        roles = 4 if config.branches == 'both' else 2
        self.query_key = ScaleOffset(roles, heads, s, {'rotary': roles, 'local': 2, 'none': 0}[config.rope])
        self.out = nn.Linear(e, d)

    def forward(self, x_BND: Tensor, tokens: Tokens) -> Tensor:
        """[B, N, D] of normalised inputs."""
        uv = F.silu(self.uv(x_BND))
        u, v = uv.chunk(2, dim=-1) if self.config.gate == 'silu' else (1, uv)
        z = z_key = F.silu(self.z(x_BND))
        if self.config.key_input == 'own':
            z_key = F.silu(self.z_key(x_BND))
        elif self.config.key_input == 'shifted':
            z_key = self.key_shift(z, tokens)
        pairs = len(self.query_key.gamma) // 2
        made = self.query_key([z[:, None], z_key[:, None]] * pairs, tokens.rope.get(self.width))
        return self.out(u * merge_heads(self.attend(self.inputs(made, split_heads(v, self.heads), x_BND), tokens)))


class MultiHeadAttention(Attention):
    """Projections to queries, keys and values of H heads."""

    def __init__(self, config: GAUConfig):
        heads, d, width = config.num_heads, config.model_dim, config.head_dim
        super().__init__(config, heads, width)
        self.qkv = nn.Linear(d, 3 * heads * width)
        self.out = nn.Linear(heads * width, d)
        if self.across:
            self.query_key_linear = ScaleOffset(2, heads, width, 2 if config.rope == 'rotary' else 0)
        if config.gate == 'silu':
            self.gate = nn.Linear(d, heads * width)

    def forward(self, x_BND: Tensor, tokens: Tokens) -> Tensor:
        """See GatedAttentionUnit."""
        q, k, v = (split_heads(x, self.heads) for x in self.qkv(x_BND).chunk(3, dim=-1))
        table = tokens.rope.get(self.width)
        made = [x if table is None else rotate(x, table) for x in (q, k)] if self.local else []
        made += self.query_key_linear([q, k], table) if self.across else []
        o = merge_heads(self.attend(self.inputs(made, v, x_BND), tokens))
        return self.out(F.silu(self.gate(x_BND)) * o if self.config.gate == 'silu' else o)


class FeedForward(nn.Module):
    """act(x W1) W2, or gated."""

    def __init__(self, config: GAUConfig):
        super().__init__()
        self.kind, d, e = config.feed_forward, config.model_dim, config.feed_forward_dim
        self.inner = nn.Linear(d, e if self.kind == 'gelu' else 2 * e)
        self.out = nn.Linear(e, d)

    def forward(self, x_BND: Tensor, tokens: Tokens) -> Tensor:
        """Every token by itself."""
        h = self.inner(x_BND)
        if self.kind == 'gelu':
            return self.out(F.gelu(h, approximate='tanh'))
        h, linear = h.chunk(2, dim=-1)
        h = F.silu(h) if self.kind == 'swiglu' else F.gelu(h, approximate='tanh')
        return self.out(h * linear)


class Block(nn.Module):
    """x + GAU(norm(x)); in a Transformer attention and feed-forward."""

    def __init__(self, config: GAUConfig):
        super().__init__()
        self.placement = config.norm_placement
        self.dropout = nn.Dropout(config.dropout_rate)
        if config.feed_forward is None:
            norms, self.gau = ['norm'], GatedAttentionUnit(config)
        else:
            norms, self.attention = ['attention_norm', 'feed_forward_norm'], MultiHeadAttention(config)
            self.feed_forward = FeedForward(config)
        for name in norms:
            self.add_module(name, Norm(config.norm, config.model_dim))
            if self.placement == 'sandwich':
                self.add_module(name.replace('norm', 'output_norm'), Norm(config.norm, config.model_dim))
            if config.short_convolution:
                convolution = name.replace('norm', 'short_convolution')
                self.add_module(convolution, ShortConvolution(config, convolution))

    def forward(self, x_BND: Tensor, tokens: Tokens) -> Tensor:
        """The new residual stream."""
        if hasattr(self, 'gau'):
            return self.residual(x_BND, 'norm', self.gau, tokens)
        x_BND = self.residual(x_BND, 'attention_norm', self.attention, tokens)
        return self.residual(x_BND, 'feed_forward_norm', self.feed_forward, tokens)

    def residual(self, x_BND: Tensor, name: str, layer: nn.Module, tokens: Tokens) -> Tensor:
        """x + f(norm(x)); norm(x + f(x)); or x + output_norm(f(norm(x))); f with its convolution."""
        parts, post = dict(self.named_children()), self.placement == 'post'
        h_BND = x_BND if post else parts[name](x_BND)
        convolution = name.replace('norm', 'short_convolution')
        if convolution in parts:
            h_BND = parts[convolution](h_BND, tokens)
        y_BND = layer(h_BND, tokens)
        if self.placement == 'sandwich':
            y_BND = parts[name.replace('norm', 'output_norm')](y_BND)
        x_BND = x_BND + self.dropout(y_BND)
        return parts[name](x_BND) if post else x_BND
