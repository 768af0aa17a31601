"""GAU, FLASH, FLASH-Quad and Transformer++ (Hua et al. 2022, arXiv 2202.10447) in PyTorch, for `transformers`.

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)     # or AutoModelForMaskedLM

All of a model is in this file. Tensors are named by their axes: B batch, N tokens, D model, E expanded, S query/key,
G chunks, C chunk, H heads, R roles, V vocabulary, W neighbours, L columns of a gate (1 or S); a head's part of E and
its width are E and S as well.
Documents: `segment_ids` [B, N] are 0 at padding and name the document of every other token; documents are contiguous
and do not see each other. An `attention_mask` is the same with one document. Decoding keeps a state that, in FLASH, has
one size whatever the length; padding in a prompt, on whichever side, is left out of it.
"""

import inspect
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

if 'cache' not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    raise ImportError('modeling_gau.py needs transformers 5.24 or newer, whose decoding states are called `cache`')

ROPE_BASE = 10_000.0
NORM_EPSILON = 1e-5
SMOOTH_RELU_EPSILON = 0.05
GATE_RANK = 16


# Fields of the config, by what they belong to, with the values of a FLASH of base size.
FIELDS = {
    **dict(architecture='flash', is_causal=True, vocab_size=32_000, context=512, num_layers=24, model_dim=768),
    **dict(output_layer='tied', short_convolution=0),
    **dict(num_heads=1, head_decay=0.0, norm='scale_norm', norm_placement='pre', dropout_rate=0.0, gate='silu'),
    **dict(absolute_position='sinusoid', rope='rotary', relative_bias='toeplitz', relative_bias_length=256),
    **dict(attention_function='relu2', normalizer='paper', normalizer_length=None, learned_temperature=False),
    **dict(chunk_size=256, branches='both', global_reduction='mean', global_decay=1.0),  # mixed chunk attention
    **dict(expanded_dim=1536, query_key_dim=128, key_input='shared'),  # gated attention units
    **dict(decay_gate='none', global_norm='none', local_window=1),  # of both
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

    def heads_at(self, layer: int) -> int:
        """Heads of a layer, which may fall with depth: max(1, ceil(H / (1 + alpha l)))."""
        return max(1, -int(-self.num_heads // (1 + (self.head_decay or 0.0) * layer)))


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


class Inputs(NamedTuple):
    """What an attention is computed of, [B, H, N, ...]: queries and keys S, values E, logits of the gate L.

    Where there is one branch alone, its queries and keys stand in the other's place too.
    """

    q: Tensor
    k: Tensor
    q_lin: Tensor
    k_lin: Tensor
    v: Tensor
    gate: Tensor | None = None


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


def smooth_relu2(x: Tensor) -> Tensor:
    """relu(x)^2 with a smooth knee."""
    middle = (x + SMOOTH_RELU_EPSILON) ** 2 / (4 * SMOOTH_RELU_EPSILON)
    linear = torch.where(x > SMOOTH_RELU_EPSILON, x, middle)
    return torch.where(x < -SMOOTH_RELU_EPSILON, torch.zeros_like(x), linear) ** 2


FUNCTIONS = {
    'relu2': lambda x: F.relu(x) ** 2,
    'laplace': lambda x: 0.5 * (1 + torch.erf((x - 0.5**0.5) / ((0.25 / torch.pi) ** 0.5 * 2**0.5))),
    'softplus2': lambda x: F.softplus(x, threshold=1e9) ** 2,
    'smooth_relu2': smooth_relu2,
}


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
    """The logits of what the state keeps over a chunk: x w + b; or, one for each column of the keys, (x W1) W2 + b."""

    def __init__(self, config: GAUConfig):
        super().__init__()
        keys = config.decay_gate == 'keys'
        self.down = nn.Parameter(torch.empty(config.model_dim, GATE_RANK if keys else 1))
        self.up = nn.Parameter(torch.empty(GATE_RANK, config.query_key_dim)) if keys else None
        self.bias = nn.Parameter(torch.zeros(config.query_key_dim if keys else 1))

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, 1, N, L], in float32."""
        logits = wide(x_BND) @ wide(self.down)
        return ((logits if self.up is None else logits @ wide(self.up)) + self.bias)[:, None]


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


class Attention(nn.Module):
    """A V with A = f(Q K^T / n + b): over the whole sequence, or in chunks with a linear attention between them."""

    def __init__(self, config: GAUConfig, heads: int, width: int):
        super().__init__()
        self.config, self.heads, self.width = config, heads, width
        self.local, self.across = config.branches != 'global', config.branches in ('both', 'global')
        self.chunks = config.local_window or 1  # that the local branch reads; the other reads those before them
        self.decay = config.global_decay or 1.0  # of a chunk's weight in the sums, for every chunk that follows it
        if config.learned_temperature:
            self.temperature = Scale()
        if config.relative_bias in ('toeplitz', 'rotary'):
            self.relative_bias = RelativeBias(config.relative_bias, heads, config.relative_bias_length, width)
        if self.across and config.decay_gate in ('scalar', 'keys'):
            self.decay_gate = DecayGate(config)
        if self.across and config.global_norm == 'rms_norm':
            self.global_norm = Norm('rms_norm', config.expanded_dim)

    def inputs(self, made: list[Tensor], v: Tensor, x_BND: Tensor) -> Inputs:
        """Queries and keys of one branch or both, values, and what the layer reads."""
        q, k, q_lin, k_lin = made * (2 // (len(made) // 2))
        if self.config.learned_temperature:
            q = q * self.temperature.scale
        return Inputs(q, k, q_lin, k_lin, v, self.decay_gate(x_BND) if hasattr(self, 'decay_gate') else None)

    def attend(self, x: Inputs, tokens: Tokens) -> Tensor:
        """[B, H, N, E] of whole sequences, of prompts, or of one token of each row."""
        ids_BN, lengths_B = tokens.ids_BN, tokens.lengths_B
        if tokens.state is not None:
            out, state = self.step(x, lengths_B, tokens.state)
        elif self.config.chunk_size is not None:
            out, state = self.mixed_chunk(x, ids_BN, lengths_B)
        else:
            out, state = self.quadratic(x, ids_BN), {} if lengths_B is None else {'k': x.k, 'v': x.v}
        tokens.new.update(state)
        return out

    def step(self, x: Inputs, lengths_B: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of each row, [B, H, 1, E]; `lengths_B` tokens of the row are in its state."""
        size, v = self.config.chunk_size, x.v
        joined = {'k': x.k, 'v': v} if self.local else {}
        old = {name: state[name] for name in joined}
        if size is None:
            places = state['k'].shape[2] + 1
            place_B, old = lengths_B, {name: F.pad(y, (0, 0, 0, 1)) for name, y in old.items()}
        else:
            places = self.chunks * size
            place_B = places - size + lengths_B % size
        if self.chunks == 2:
            # A chunk that begins makes the current one that before it.
            begins = (lengths_B % size == 0)[:, None, None, None]
            old = {name: torch.where(begins, y.roll(size, dims=2), y) for name, y in old.items()}
        index_M = torch.arange(places, device=v.device)
        here = (index_M == place_B[:, None])[:, None, :, None]
        new = {name: torch.where(here, joined[name], y) for name, y in old.items()}
        out = torch.zeros_like(v)
        if self.local:
            bias = None
            if hasattr(self, 'relative_bias'):
                bias = self.relative_bias(place_B[:, None], places).transpose(0, 1)
            before_BM = place_B[:, None] - index_M
            seen = ((before_BM >= 0) & (before_BM <= lengths_B[:, None]))[:, None, None]
            out = self.weights(x.q, new['k'], seen, places, bias).to(v.dtype) @ new['v']
        if self.across:
            far = self.scaled(x.q_lin, state['count']).to(v.dtype) @ state['sum'].to(v.dtype)
            out = out + (self.global_norm(far) if hasattr(self, 'global_norm') else far)
            new |= self.folded(x, lengths_B, state)
        return out, new

    def folded(self, x: Inputs, lengths_B: Tensor, state: State) -> State:
        """What a state has of the chunks after a token, which may make the open one full."""
        size, new = self.config.chunk_size, {}
        full = (lengths_B % size == size - 1)[:, None, None, None]
        chunk = state['open'] + wide(x.k_lin).transpose(-1, -2) @ wide(x.v)
        new['open'], tokens = chunk.masked_fill(full, 0), size
        if x.gate is not None:
            logits = state['gate'] + x.gate
            new['gate'] = logits.masked_fill(full, 0)
        if self.chunks == 2:
            # The local branch reads this chunk until the next one is full: it waits.
            new['last'], chunk = torch.where(full, chunk, state['last']), state['last']
            tokens = size * (lengths_B >= size)[:, None, None, None]
            if x.gate is not None:
                new['last_gate'], logits = torch.where(full, logits, state['last_gate']), state['last_gate']
        kept = torch.full_like(state['count'], self.decay) if x.gate is None else torch.sigmoid(logits / size)
        new['sum'] = torch.where(full, kept.transpose(-1, -2) * state['sum'] + chunk, state['sum'])
        new['count'] = torch.where(full, kept * state['count'] + tokens, state['count'])
        return new

    def weights(self, q: Tensor, k: Tensor, mask: Tensor, length: Tensor | int, bias: Tensor | None) -> Tensor:
        """A [..., N, M], exactly 0 where not seen; `length` is n of the normalizer `paper`."""
        function, normalizer = self.config.attention_function, self.config.normalizer
        x = wide(q) @ wide(k).transpose(-1, -2)
        seen = mask.sum(-1, keepdim=True).clamp(min=1)
        if function == 'softmax' or normalizer == 'su':
            x = x * self.width**-0.5
        elif function == 'softmax_plus':
            x = x * (self.width**-0.5 / math.log(512) * seen.to(x.dtype).log())
        else:
            x = x / {'visible': seen, 'fixed': self.config.normalizer_length, 'paper': length}[normalizer]
        if bias is not None:
            x = x + bias
        if function in ('softmax', 'softmax_plus'):
            x = torch.softmax(x.masked_fill(~mask, torch.finfo(x.dtype).min), dim=-1)
        else:
            x = FUNCTIONS[function](x)
            x = x / seen if normalizer == 'su' else x
        return x.masked_fill(~mask, 0)

    def scaled(self, q_lin: Tensor, count: Tensor) -> Tensor:
        """Queries of the linear attention over the number of tokens that they read; 0 where there are none."""
        dtype = wide(q_lin).dtype
        share = 1 / torch.where(count > 0, count, 1).to(dtype) if self.config.global_reduction == 'mean' else 1.0
        return wide(q_lin) * ((count > 0).to(dtype) * share)

    def quadratic(self, x: Inputs, ids_BN: Tensor | None) -> Tensor:
        """Every query against every key that it sees."""
        n, device = x.v.shape[2], x.v.device
        index_N = torch.arange(n, device=device)
        mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=device)
        length = n
        if ids_BN is not None:
            mask = ((ids_BN[:, :, None] == ids_BN[:, None]) & (ids_BN > 0)[:, None])[:, None]
            length = mask.sum(-1, keepdim=True).clamp(min=1)
        if self.config.is_causal:
            mask = mask & (index_N <= index_N[:, None])
        bias = self.relative_bias(index_N, n) if hasattr(self, 'relative_bias') else None
        return self.weights(x.q, x.k, mask, length, bias).to(x.v.dtype) @ x.v

    def mixed_chunk(self, x: Inputs, ids_BN: Tensor | None, lengths_B: Tensor | None) -> tuple[Tensor, State]:
        """Attention inside chunks; to what lies before them (or to all tokens) by one sum of k v^T each."""
        (batch, _, n, _), size, causal = x.v.shape, self.config.chunk_size, self.config.is_causal
        groups = (n + size - 1) // size
        # The last chunk is filled up with padding, which nobody sees.
        index_GC = torch.arange(groups * size, device=x.v.device).view(groups, size)
        inside_GC = index_GC.clamp(max=n - 1)
        real_BGC = (index_GC < n)[None]
        ids_BGC = real_BGC.long() if ids_BN is None else ids_BN[:, inside_GC] * real_BGC
        x = Inputs(*(y if y is None else y[:, :, inside_GC] * real_BGC[:, None, ..., None] for y in x))
        q, k, q_lin, k_lin, v, _ = x
        out, state = torch.zeros_like(v), {}
        if self.local:
            out = self.weights_in_chunks(q, k, ids_BGC).to(v.dtype) @ before(v, self.chunks)
        if self.across:
            kept_BLG = self.kept(x, ids_BGC)
            seen, kv = self.other_chunks(k_lin, v, ids_BGC, kept_BLG)
            count_BGCL = sum(sees[..., None] * count[:, :, None] for _, count, sees in seen)
            same = documents(ids_BGC, ids_BGC)
            q_lin = self.scaled(q_lin, (count_BGCL if causal else count_BGCL + same.sum(-1, keepdim=True))[:, None])
            far = torch.zeros_like(v)
            if not causal:
                far = (q_lin @ wide(k_lin).transpose(-1, -2)).masked_fill(~same[:, None], 0).to(v.dtype) @ v
            for sums, _, sees in seen:
                far = far + (q_lin * sees[:, None, ..., None]).to(v.dtype) @ sums.to(v.dtype)
            out = out + (self.global_norm(far) if hasattr(self, 'global_norm') else far)
            if lengths_B is not None:
                state = self.state_of(kv, x.gate, kept_BLG, lengths_B)
        if self.local and lengths_B is not None:
            rows, last_B = torch.arange(batch, device=v.device), (lengths_B - 1).clamp(min=0) // size
            state |= {name: before(y, self.chunks)[rows, :, last_B] for name, y in (('k', k), ('v', v))}
        index_N = torch.arange(n, device=v.device)
        return out[:, :, index_N // size, index_N % size], state

    def weights_in_chunks(self, q: Tensor, k: Tensor, ids_BGC: Tensor) -> Tensor:
        """A of every chunk to itself, [B, H, G, C, C], or to the one before and itself, [B, H, G, C, 2 C]."""
        size = self.config.chunk_size
        mask = documents(ids_BGC, before(ids_BGC[:, None, ..., None], self.chunks)[:, 0, ..., 0])[:, None]
        key_M = torch.arange(self.chunks * size, device=q.device)
        query_C = key_M[-size:]
        if self.config.is_causal:
            mask = mask & (key_M <= query_C[:, None])
        bias = self.relative_bias(query_C, len(key_M))[:, None] if hasattr(self, 'relative_bias') else None
        return self.weights(q, before(k, self.chunks), mask, self.chunks * size, bias)

    def kept(self, x: Inputs, ids_BGC: Tensor) -> Tensor | None:
        """The log of what a gate keeps of a state over all chunks before each, [B, L, G + 1]."""
        if x.gate is None:
            return None
        real = (ids_BGC > 0)[..., None]
        logs_BGL = F.logsigmoid((x.gate[:, 0] * real).sum(2) / real.sum(2).clamp(min=1))
        return F.pad(logs_BGL.transpose(1, 2).cumsum(2), (1, 0))

    def other_chunks(self, k_lin, v, ids_BGC, kept_BLG) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """What each chunk sees of the others: (sums of k v^T [B, H, G, S, E], tokens in them [B, G, L], who sees them).

        A chunk continues the one document that is open at its start, so it needs the sums of that one alone. Also
        returns k v^T of all tokens of each chunk.
        """
        real = ids_BGC > 0
        first, last = (
            ids.gather(-1, there.long().argmax(-1, keepdim=True))
            for ids, there in ((ids_BGC, real), (ids_BGC.flip(-1), real.flip(-1)))
        )
        g = torch.arange(ids_BGC.shape[1], device=v.device)
        read = g - (self.chunks - 1)  # up to which chunk a chunk reads here
        directions = [(first, last, read[:, None] > g)] + (
            [] if self.config.is_causal else [(last, first, g[:, None] < g)]
        )
        if kept_BLG is None:
            factor = self.decay ** (read[:, None] - g - 1).clamp(min=0).to(wide(v).dtype)
        else:
            between = kept_BLG[..., read.clamp(min=0)][..., :, None] - kept_BLG[..., g + 1][..., None, :]
            factor = between.clamp(max=0).exp()
        seen = []
        for head, tail, order_GG in directions:
            at_tail = (ids_BGC == tail) & real
            kv = torch.einsum('bhgcs,bhgce->bhgse', wide(k_lin * at_tail[:, None, ..., None]), wide(v))
            continues_BGG = (order_GG & (head == tail.transpose(1, 2)) & (head > 0)).to(kv.dtype)
            weights_BLGG = continues_BGG[:, None] * factor
            count = (weights_BLGG @ at_tail.sum(-1, keepdim=True).to(kv.dtype)[:, None])[..., 0].transpose(1, 2)
            if weights_BLGG.shape[1] == 1:
                sums = torch.einsum('bgi,bhise->bhgse', weights_BLGG[:, 0].expand(v.shape[0], -1, -1), kv)
            else:
                sums = (weights_BLGG @ kv[:, 0].transpose(1, 2)).transpose(1, 2)[:, None]
            seen.append((sums, count, (ids_BGC == head) & real))
        return seen, kv

    def state_of(self, kv: Tensor, gate: Tensor | None, kept_BLG: Tensor | None, lengths_B: Tensor) -> State:
        """The state of rows of one document each, of these lengths: chunks summed, the open one, and what waits."""
        size, complete_B = self.config.chunk_size, lengths_B // self.config.chunk_size
        index_G = torch.arange(kv.shape[2], device=kv.device)
        read_B1 = complete_B[:, None] - (self.chunks - 1)  # up to which chunk the open one reads here
        if kept_BLG is None:
            factor_BLG = self.decay ** (read_B1 - index_G - 1).clamp(min=0).to(kv.dtype)[:, None]
        else:
            places_BL1 = read_B1.clamp(min=0)[:, None].expand(-1, kept_BLG.shape[1], 1)
            factor_BLG = (kept_BLG.gather(2, places_BL1) - kept_BLG[..., 1:]).clamp(max=0).exp()
        weights_BLG = (index_G < read_B1).to(kv.dtype)[:, None] * factor_BLG
        state = {
            'sum': torch.einsum('bsg,bhgse->bhse', weights_BLG, kv),
            'count': (size * weights_BLG.sum(2))[:, None, None],
        }
        for apart, (of_chunk, of_gate) in enumerate((('open', 'gate'), ('last', 'last_gate'))[: self.chunks]):
            there_BG = (index_G == complete_B[:, None] - apart).to(kv.dtype)
            state[of_chunk] = torch.einsum('bg,bhgse->bhse', there_BG, kv)
            if gate is not None:
                index_GC = torch.arange(kv.shape[2] * size, device=kv.device).view(-1, size)
                is_real = (index_GC < lengths_B[:, None, None])[..., None]
                state[of_gate] = (there_BG[..., None] * (gate[:, 0] * is_real).sum(2)).sum(1)[:, None, None]
        return state


def documents(queries: Tensor, keys: Tensor) -> Tensor:
    """Which tokens are of one document, [B, G, C, M], given ids [B, G, C] and [B, G, M]; 0 is padding."""
    return (queries[..., None] == keys[..., None, :]) & (keys > 0)[..., None, :]


def before(x: Tensor, chunks: int) -> Tensor:
    """Every chunk of [B, H, G, C, ...]; if asked for two, [B, H, G, 2 C, ...], after the one before it, zeros first."""
    if chunks == 1:
        return x
    g = torch.arange(x.shape[2], device=x.device)
    return torch.cat([x[:, :, (g - 1).clamp(min=0)] * (g > 0)[:, None, None], x], dim=3)


def split_heads(x_BNE: Tensor, heads: int) -> Tensor:
    """[B, N, E] as [B, H, N, E / H]."""
    return x_BNE.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHNE: Tensor) -> Tensor:
    """[B, H, N, E / H] as [B, N, E]."""
    return x_BHNE.transpose(1, 2).flatten(2)


class GatedAttentionUnit(Attention):
    """O = (U * (A V)) Wo, with U, V and Z = silu(X W), and queries and keys made of Z."""

    def __init__(self, config: GAUConfig, layer: int):
        heads, d, e, s = config.heads_at(layer), config.model_dim, config.expanded_dim, config.query_key_dim
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

    def __init__(self, config: GAUConfig, layer: int):
        heads, d = config.heads_at(layer), config.model_dim
        width = d // heads if config.head_decay else config.head_dim
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

    def __init__(self, config: GAUConfig, layer: int):
        super().__init__()
        self.placement = config.norm_placement
        self.dropout = nn.Dropout(config.dropout_rate)
        if config.feed_forward is None:
            norms, self.gau = ['norm'], GatedAttentionUnit(config, layer)
        else:
            norms, self.attention = ['attention_norm', 'feed_forward_norm'], MultiHeadAttention(config, layer)
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


class GAUCache:
    """The state of decoded sequences: `lengths_B` tokens of each row, in a dict of tensors for each layer."""

    is_compileable = False

    def __init__(self, layers: list[State], lengths_B: Tensor, columns: int):
        self.layers, self.lengths_B, self.columns = layers, lengths_B, columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the input that have been read, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes these rows, as beam search asks."""
        self.layers = [{name: x[beam_idx] for name, x in state.items()} for state in self.layers]
        self.lengths_B = self.lengths_B[beam_idx]


@dataclass
class GAUOutput(ModelOutput):
    """Loss (with labels), logits [B, N, V], and the state to go on from."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: GAUCache | None = None


class GAUPreTrainedModel(PreTrainedModel):
    """The model with its output layer, which is the embedding transposed or a matrix of its own."""

    config_class = GAUConfig
    base_model_prefix = ''
    _no_split_modules = ['Block']  # noqa: RUF012

    def __init__(self, config: GAUConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        if config.absolute_position == 'sinusoid':
            self.position = Scale()
        self.dropout = nn.Dropout(config.dropout_rate)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        if config.norm_placement != 'post':
            self.final_norm = Norm(config.norm, config.model_dim)
        if config.output_layer == 'own':
            self.output = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name == 'scale':
                nn.init.ones_(parameter)
            elif name in ('bias', 'beta'):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, which is the output layer as well where that has no matrix of its own."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces it."""
        self.embedding = value

    def stack(
        self,
        tokens_BN: Tensor,
        ids_BN: Tensor | None,
        positions_BN: Tensor,
        lengths_B: Tensor | None = None,
        layers: list[State] | None = None,
    ) -> tuple[Tensor, list[State]]:
        """Embedding, blocks and last norm, [B, N, D], and the new states where there are lengths (see `Tokens`)."""
        config, x_BND = self.config, self.embedding(tokens_BN)
        dtype = x_BND.dtype
        if config.absolute_position == 'sinusoid':
            turned = angles(positions_BN, config.model_dim // 2, dtype)
            x_BND = x_BND + (self.position.scale * torch.cat([turned.sin(), turned.cos()], dim=-1)).to(dtype)
        x_BND = self.dropout(x_BND)
        if ids_BN is not None:
            x_BND = x_BND * (ids_BN > 0)[..., None]
        rope = {}
        if config.rope != 'none':
            for width in {module.width for module in self.modules() if isinstance(module, Attention)}:
                turned = angles(positions_BN, width // 2, dtype)[:, None]
                rope[width] = turned.cos(), turned.sin()
        new: list[State] = [{} for _ in self.blocks]
        for block, state, after in zip(self.blocks, layers or [None] * len(new), new, strict=True):
            x_BND = block(x_BND, Tokens(ids_BN, rope, lengths_B, state, after))
        return x_BND if config.norm_placement == 'post' else self.final_norm(x_BND), new

    def hidden(self, tokens_BN: Tensor, ids_BN: Tensor | None, positions_BN: Tensor) -> Tensor:
        """What the output layer reads of whole sequences, [B, N, D]."""
        return self.stack(tokens_BN, ids_BN, positions_BN)[0]

    def head(self, h_BND: Tensor) -> Tensor:
        """Logits [B, N, V], at least float32."""
        return wide(F.linear(h_BND, (self.output if hasattr(self, 'output') else self.embedding).weight))

    def read(self, input_ids, attention_mask, position_ids, segment_ids) -> Tensor:
        """`hidden` of what `forward` is given."""
        ids_BN = segment_ids
        if ids_BN is None and attention_mask is not None and not attention_mask.all():
            ids_BN = attention_mask
        if position_ids is None:
            index_N = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = index_N[None]
            if ids_BN is not None:
                begins = F.pad(ids_BN[:, 1:] != ids_BN[:, :-1], (1, 0), value=True)
                position_ids = index_N - (begins * index_N).cummax(dim=1).values
        return self.hidden(input_ids, None if ids_BN is None else ids_BN.long(), position_ids)


class GAUForMaskedLM(GAUPreTrainedModel):
    """A bidirectional model that predicts hidden tokens."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, segment_ids=None, labels=None, return_dict=None
    ):
        """Logits and, with labels (-100: not counted), the mean loss.

        Positions, unless given, begin with each document; all arguments are [B, N].
        """
        logits = self.head(self.read(input_ids, attention_mask, position_ids, segment_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = GAUOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


class GAUForCausalLM(GAUPreTrainedModel, GenerationMixin):
    """A causal model, which also writes."""

    _is_stateful = True  # its state cannot go back, as assisted decoding would ask

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        segment_ids=None,
        labels=None,
        cache=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
    ):
        """Logits and, with labels (-100: not counted; shifted here), the mean loss.

        Positions, unless given, begin with each document; all arguments are [B, N]. With `use_cache` the state comes
        back as `cache`; given again, `input_ids` are the tokens that follow.
        """
        if use_cache or cache is not None:
            if position_ids is not None or segment_ids is not None:
                raise ValueError(
                    'decoding goes on with one document a row, from position 0: no position_ids or segment_ids'
                )
            h_BND, cache = self.decode(input_ids, attention_mask, cache)
        else:
            h_BND = self.read(input_ids, attention_mask, position_ids, segment_ids)
        logits = self.head(h_BND[:, -logits_to_keep:] if logits_to_keep else h_BND)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = GAUOutput(loss=loss, logits=logits, cache=cache)
        return output.to_tuple() if return_dict is False else output

    def decode(self, input_ids: Tensor, attention_mask: Tensor | None, cache: GAUCache | None):
        """Reads a prompt, or goes on from a state; returns [B, N, D] and the new state."""
        if cache is None:
            return self.prefill(input_ids, attention_mask)
        columns, hidden = cache.columns, []
        if input_ids.shape[1] > 1 and attention_mask is not None and not attention_mask[:, columns:].all():
            raise ValueError('only the prompt may have padding: tokens that follow it must not')
        layers, lengths_B = cache.layers, cache.lengths_B
        for tokens_B1 in input_ids.split(1, dim=1):
            h_B1D, layers = self.step(tokens_B1, lengths_B, layers)
            hidden.append(h_B1D)
            lengths_B = lengths_B + 1
        return torch.cat(hidden, dim=1), GAUCache(layers, lengths_B, columns + input_ids.shape[1])

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None):
        """Reads prompts in parallel."""
        if self.config.normalizer == 'paper' and self.config.chunk_size is None:
            raise ValueError('normalizer=paper divides by the length of the whole sequence: use_cache=False is needed')
        batch, n = input_ids.shape
        lengths_B = torch.full((batch,), n, device=input_ids.device)
        order_BN, ids_BN, index_N = None, None, torch.arange(n, device=input_ids.device)
        if attention_mask is not None and not attention_mask.all():
            # Every row's tokens go to its beginning: where the padding stood leaves no trace.
            order_BN = (attention_mask == 0).long().argsort(dim=1, stable=True)
            lengths_B = attention_mask.sum(1)
            input_ids, ids_BN = input_ids.gather(1, order_BN), (index_N < lengths_B[:, None]).long()
        h_BND, layers = self.stack(input_ids, ids_BN, index_N[None], lengths_B)
        if order_BN is not None:
            h_BND = h_BND.gather(1, order_BN.argsort(dim=1)[..., None].expand_as(h_BND))
        return h_BND, GAUCache(layers, lengths_B, n)

    def step(self, tokens_B1: Tensor, lengths_B: Tensor, layers: list[State]) -> tuple[Tensor, list[State]]:
        """Reads one token a row; returns [B, 1, D] and the new states."""
        return self.stack(tokens_B1, None, lengths_B[:, None], lengths_B, layers)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(self, input_ids, cache=None, attention_mask=None, use_cache=True, **kwargs):
        """What `generate` calls `forward` with: the prompt, then what the state has not read yet."""
        if kwargs.get('inputs_embeds') is not None:
            raise ValueError('generate needs input_ids, not inputs_embeds')
        return {
            'input_ids': input_ids if cache is None else input_ids[:, cache.columns :],
            'attention_mask': attention_mask,
            'cache': cache,
            'use_cache': use_cache,
        }
