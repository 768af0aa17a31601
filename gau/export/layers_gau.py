"""The layers of `modeling_gau.py` that are no attention: norms, positions, neighbours of tokens, gates."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_gau import GAUConfig

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-5


State = dict[str, Tensor]


class Tokens(NamedTuple):
    """What the layers of a block are told about their tokens.

    ids_BN: segment ids; None: every token is of one document.
    rope: for each width, cosines and sines [B, 1, N, width / 2].
    lengths_B: where sequences are decoded, the tokens of each row: of a prompt, padded on the right; or of its state.
    state: the block's, to go on from with one token a row; None: whole sequences, or prompts.
    new: the layers put the state after these tokens here, where sequences are decoded.
    """

    ids_BN: Tensor | None
    rope: dict[int, tuple[Tensor, Tensor]]
    lengths_B: Tensor | None
    state: State | None
    new: State


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def angles(positions: Tensor, half: int, dtype: torch.dtype) -> Tensor:
    """position * 10000^(-i / half), [..., half]."""
    # In float64, which not every device has: at far positions the last bit of a frequency shows.
    frequencies = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64, device='cpu') / half)
    dtype = torch.promote_types(dtype, torch.float32)
    return positions[..., None].to(dtype) * frequencies.to(positions.device, dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the pairs (x[i], x[i + S / 2])."""
    cos, sin = table
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class Norm(nn.Module):
    """ScaleNorm (one scale), RMSNorm (one for each feature) or LayerNorm (with a bias)."""

    def __init__(self, kind: str, width: int):
        super().__init__()
        shape = () if kind == 'scale_norm' else (width,)
        self.scale = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if kind == 'layer_norm' else None

    def forward(self, x_BND: Tensor) -> Tensor:
        """x / rms(x) * scale, in float32."""
        y_BND = wide(x_BND)
        if self.bias is not None:
            y_BND = y_BND - y_BND.mean(-1, keepdim=True)
        y_BND = y_BND * torch.rsqrt((y_BND**2).mean(-1, keepdim=True) + NORM_EPSILON) * self.scale
        return (y_BND if self.bias is None else y_BND + self.bias).to(x_BND.dtype)


class Scale(nn.Module):
    """One learned number."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class ScaleOffset(nn.Module):
    """Cheap queries and keys: x * gamma + beta for each of R roles."""

    def __init__(self, roles: int, heads: int, width: int, rotated: int):
        super().__init__()
        self.rotated = rotated
        self.gamma = nn.Parameter(torch.empty(roles, heads, width))
        self.beta = nn.Parameter(torch.zeros(roles, heads, width))

    def forward(self, x: list[Tensor], table: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Maps R arrays [B, H or 1, N, S] to R arrays [B, H, N, S], the first `rotated` of them by the table."""
        made = [y * g[:, None] + b[:, None] for y, g, b in zip(x, self.gamma, self.beta, strict=True)]
        return [rotate(y, table) for y in made[: self.rotated]] + made[self.rotated :]


def neighbours(x_BND: Tensor, width: int, causal: bool, tokens: Tokens, name: str) -> list[Tensor]:
    """The W tokens before each one, the nearest first; or W / 2 before it, then W / 2 after it: W arrays [B, N, D].

    Zeros stand for those of other documents. The state `name` [B, W, D] has a row's last W tokens.
    """
    n, lengths_B = x_BND.shape[1], tokens.lengths_B
    if tokens.state is not None:
        all_BMD = torch.cat([tokens.state[name], x_BND], dim=1)
        tokens.new[name] = all_BMD[:, 1:]
        return [all_BMD[:, width - offset, None] for offset in range(1, width + 1)]
    if lengths_B is not None:
        places_BW = lengths_B[:, None] + torch.arange(width, device=x_BND.device)
        all_BMD = F.pad(x_BND, (0, 0, width, 0))
        tokens.new[name] = all_BMD.gather(1, places_BW[..., None].expand(-1, -1, x_BND.shape[-1]))
    before = range(1, 1 + (width if causal else width // 2))
    found = []
    for offset in [*before, *(() if causal else (-offset for offset in before))]:
        index_N = torch.arange(n, device=x_BND.device) - offset
        there_N = index_N.clamp(min=0, max=n - 1)
        same_BN = (index_N == there_N)[None]
        if tokens.ids_BN is not None:
            same_BN = same_BN & (tokens.ids_BN[:, there_N] == tokens.ids_BN) & (tokens.ids_BN > 0)
        found.append(x_BND[:, there_N].masked_fill(~same_BN[..., None], 0))
    return found


class ShortConvolution(nn.Module):
    """Adds to each token a weighted sum of its neighbours, column by column."""

    def __init__(self, config: GAUConfig, name: str):
        super().__init__()
        self.name, self.causal = name, config.is_causal
        self.weights = nn.Parameter(torch.zeros(config.short_convolution, config.model_dim))

    def forward(self, x_BND: Tensor, tokens: Tokens) -> Tensor:
        """x_n + sum_i w_i x_(n - i)."""
        found = neighbours(x_BND, len(self.weights), self.causal, tokens, self.name)
        total_BND = wide(x_BND) + sum(w_D * wide(y_BND) for w_D, y_BND in zip(self.weights, found, strict=True))
        return total_BND.to(x_BND.dtype)


class KeyShift(nn.Module):
    """Mixes each token with the one before it, column by column."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Parameter(torch.linspace(0, 1, width))

    def forward(self, z_BNS: Tensor, tokens: Tokens) -> Tensor:
        """(1 - m) z_n + m z_(n - 1)."""
        (before_BNS,) = neighbours(z_BNS, 1, True, tokens, 'z')
        mixed_BNS = wide(z_BNS) + self.mix * (wide(before_BNS) - wide(z_BNS))
        return mixed_BNS.to(z_BNS.dtype)


class DecayGate(nn.Module):
    """The logits of what the state keeps over a chunk, x w + b."""

    def __init__(self, width: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, 1, N, 1], in float32."""
        return (wide(x_BND) @ wide(self.down) + self.bias)[:, None]


class RelativeBias(nn.Module):
    """b[q, k], a function of k - q: a learned table, or two rotated vectors."""

    def __init__(self, kind: str, heads: int, length: int, width: int):
        super().__init__()
        self.kind, self.length = kind, length
        if kind == 'toeplitz':
            self.table = nn.Parameter(torch.empty(heads, 2 * length - 1))
        else:
            self.a, self.c = nn.Parameter(torch.empty(heads, width)), nn.Parameter(torch.empty(heads, width))

    def forward(self, queries: Tensor, n: int) -> Tensor:
        """Rows of these queries [...] for n keys, [H, ..., n]."""
        device = queries.device
        distances = torch.arange(n, device=device) - queries[..., None]
        if self.kind == 'toeplitz':
            if not torch.compiler.is_compiling() and n > self.length:
                raise ValueError(f'a relative bias of {self.length} positions cannot serve {n}')
            return self.table[:, distances + self.length - 1]
        turned = angles(torch.arange(1 - n, n, device=device), self.a.shape[-1] // 2, self.a.dtype)
        by_distance = (rotate(self.c[:, None], (turned.cos(), turned.sin())) * self.a[:, None]).sum(-1)
        return by_distance[:, distances + n - 1]
