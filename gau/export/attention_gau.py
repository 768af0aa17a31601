"""The attention of `modeling_gau.py`: quadratic, in mixed chunks, and token by token."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_gau import GAUConfig
from .layers_gau import DecayGate, RelativeBias, Scale, State, Tokens, wide

SMOOTH_RELU_EPSILON = 0.05


class Inputs(NamedTuple):
    """What an attention is computed of, [B, H, N, ...]: queries and keys S, values E, logits of the gate 1.

    Where there is one branch alone, its queries and keys stand in the other's place too.
    """

    q: Tensor
    k: Tensor
    q_lin: Tensor
    k_lin: Tensor
    v: Tensor
    gate: Tensor | None = None


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


class Attention(nn.Module):
    """A V with A = f(Q K^T / n + b): over the whole sequence, or in chunks with a linear attention between them."""

    def __init__(self, config: GAUConfig, heads: int, width: int):
        super().__init__()
        self.config, self.heads, self.width = config, heads, width
        self.local, self.across = config.branches != 'global', config.branches in ('both', 'global')
        self.chunks = config.local_window or 1  # that the local branch reads; the other reads those before them
        if config.learned_temperature:
            self.temperature = Scale()
        if config.relative_bias in ('toeplitz', 'rotary'):
            self.relative_bias = RelativeBias(config.relative_bias, heads, config.relative_bias_length, width)
        if self.across and config.decay_gate == 'scalar':
            self.decay_gate = DecayGate(config.model_dim)

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
            out = out + far
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
        kept = 1 if x.gate is None else torch.sigmoid(logits / size)
        new['sum'] = torch.where(full, kept * state['sum'] + chunk, state['sum'])
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
            kept_BG = self.kept(x, ids_BGC)
            seen, kv = self.other_chunks(k_lin, v, ids_BGC, kept_BG)
            count_BGC1 = sum(sees[..., None] * count[:, :, None] for _, count, sees in seen)
            same = documents(ids_BGC, ids_BGC)
            q_lin = self.scaled(q_lin, (count_BGC1 if causal else count_BGC1 + same.sum(-1, keepdim=True))[:, None])
            far = torch.zeros_like(v)
            if not causal:
                far = (q_lin @ wide(k_lin).transpose(-1, -2)).masked_fill(~same[:, None], 0).to(v.dtype) @ v
            for sums, _, sees in seen:
                far = far + (q_lin * sees[:, None, ..., None]).to(v.dtype) @ sums.to(v.dtype)
            out = out + far
            if lengths_B is not None:
                state = self.state_of(kv, x.gate, kept_BG, lengths_B)
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
        """The log of what a gate keeps of a state over all chunks before each, [B, G + 1]."""
        if x.gate is None:
            return None
        real = (ids_BGC > 0)[..., None]
        tokens = real.sum(2)
        # A chunk of padding alone keeps the state.
        logs_BG1 = F.logsigmoid((x.gate[:, 0] * real).sum(2) / tokens.clamp(min=1)).masked_fill(tokens == 0, 0)
        return F.pad(logs_BG1[..., 0].cumsum(1), (1, 0))

    def other_chunks(self, k_lin, v, ids_BGC, kept_BG) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        """What each chunk sees of the others: (sums of k v^T [B, H, G, S, E], tokens in them [B, G, 1], who sees them).

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
        factor_BGG = 1
        if kept_BG is not None:
            between_BGG = kept_BG[:, read.clamp(min=0)][..., None] - kept_BG[:, g + 1][:, None]
            factor_BGG = between_BGG.clamp(max=0).exp()
        seen = []
        for head, tail, order_GG in directions:
            at_tail = (ids_BGC == tail) & real
            kv = torch.einsum('bhgcs,bhgce->bhgse', wide(k_lin * at_tail[:, None, ..., None]), wide(v))
            continues_BGG = (order_GG & (head == tail.transpose(1, 2)) & (head > 0)).to(kv.dtype)
            weights_BGG = continues_BGG * factor_BGG
            count = weights_BGG @ at_tail.sum(-1, keepdim=True).to(kv.dtype)
            sums = torch.einsum('bgi,bhise->bhgse', weights_BGG.expand(v.shape[0], -1, -1), kv)
            seen.append((sums, count, (ids_BGC == head) & real))
        return seen, kv

    def state_of(self, kv: Tensor, gate: Tensor | None, kept_BG: Tensor | None, lengths_B: Tensor) -> State:
        """The state of rows of one document each, of these lengths: chunks summed, the open one, and what waits."""
        size, complete_B = self.config.chunk_size, lengths_B // self.config.chunk_size
        index_G = torch.arange(kv.shape[2], device=kv.device)
        read_B1 = complete_B[:, None] - (self.chunks - 1)  # up to which chunk the open one reads here
        weights_BG = (index_G < read_B1).to(kv.dtype)
        if kept_BG is not None:
            weights_BG = weights_BG * (kept_BG.gather(1, read_B1.clamp(min=0)) - kept_BG[:, 1:]).clamp(max=0).exp()
        state = {
            'sum': torch.einsum('bg,bhgse->bhse', weights_BG, kv),
            'count': (size * weights_BG.sum(1))[:, None, None, None],
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
