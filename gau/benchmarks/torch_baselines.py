"""What people use instead, in PyTorch, for the benchmark alone: the same sizes, batches and clock as our models.

`torch_flash_lucidrains` is FLASH-pytorch 0.1.9 (https://github.com/lucidrains/FLASH-pytorch) as it comes, with a head
of its own that is not tied; `torch_transformer_plus_plus` is a Transformer++ of our shape with PyTorch's fused
attention. Both keep float32 parameters, compute under bfloat16 autocast and take fused AdamW steps, without clipping.
FLOPs are counted as our own model's of that shape.

`impl` is `compiled` (torch.compile), `eager`, or `compiled_cudnn`, where attention may be cuDNN's only: on a GPU the
others leave PyTorch the choice between cuDNN's and FlashAttention, and never the one that makes an N x N matrix.

requirements-benchmark.txt has what this file imports; nothing else imports this file.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor, nn

from gau.benchmarks.cells import Cell
from gau.benchmarks.timing import time_steps
from gau.errors import UserError

Result = dict[str, Any]

BATCHES = 4
MASK_RATE = 0.15
ROPE_BASE = 10_000.0


def measure(cell: Cell, result: Result) -> None:
    """Puts times and memory of a training step or forward pass into `result`, each as soon as it is known.

    Raises:
      UserError: packed documents, which neither baseline keeps apart, another optimizer than adamw, or a loss that is
        not finite.
    """
    if cell.packed:
        raise UserError(f'{cell.spec.model} does not keep packed documents apart')
    if cell.optimizer != 'adamw':
        raise UserError(f'{cell.spec.model} is trained with adamw, not {cell.optimizer}')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    _choose_kernels(cell.spec.impl)
    model = _BUILDERS[cell.spec.model](cell.model_config(), cell).to(device)
    result.update(
        device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        torch=torch.__version__,
        tokens=cell.batch_size * cell.context,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops_per_token=cell.flops_per_token(),
        impl_chosen=cell.spec.impl,
    )
    launch_one = _train_step(cell, model, device) if cell.benchmark == 'train' else _forward(cell, model, device)
    batches, loss = itertools.cycle(_batches(cell, device)), None

    def launch() -> torch.cuda.Event | None:
        nonlocal loss
        loss = launch_one(*next(batches))
        if device == 'cpu':
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()

    started = time.perf_counter()
    wait(launch())
    first = time.perf_counter() - started
    times = time_steps(launch, wait, effort=cell.effort)
    if not math.isfinite(float(loss)):
        raise UserError(f'the loss is {float(loss)} after {len(times.seconds)} steps: their times would mean nothing')
    result.update(times._asdict(), loss=float(loss))
    if cell.spec.impl != 'eager':
        # Compiling is what the first step takes longer than the others.
        result.update(compile_seconds=max(first - statistics.median(times.seconds), 0.0), compile_cached=_was_cached())
    result['peak_bytes'] = torch.cuda.max_memory_allocated() if device == 'cuda' else None


def _choose_kernels(impl: str) -> None:
    torch.set_float32_matmul_precision('high')
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(impl != 'compiled_cudnn')


def _was_cached() -> bool:
    from torch._dynamo.utils import counters

    return bool(counters['inductor']['fxgraph_cache_hit'] or counters['aot_autograd']['autograd_cache_hit'])


def _batches(cell: Cell, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Random inputs and targets int64 and weights float32, each [B, N]."""
    generator, shape = torch.Generator(device).manual_seed(0), (cell.batch_size, cell.context)
    rate = MASK_RATE if cell.objective == 'mlm' else 1.0
    options = {'generator': generator, 'device': device}
    return [
        (
            torch.randint(cell.vocab_size, shape, **options),
            torch.randint(cell.vocab_size, shape, **options),
            (torch.rand(shape, **options) < rate).float(),
        )
        for _ in range(BATCHES)
    ]


def _token_losses(cell: Cell, model: nn.Module, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    def losses(tokens_BN: Tensor, targets_BN: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=cell.dtype == 'bfloat16'):
            logits_BNV = model(tokens_BN)
            return F.cross_entropy(logits_BNV.flatten(0, 1), targets_BN.flatten(), reduction='none')

    return losses if cell.spec.impl == 'eager' else torch.compile(losses, dynamic=False)


def _train_step(cell: Cell, model: nn.Module, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    losses = _token_losses(cell, model, device)
    # The paper's recipe, as in gau.training.config; the rate of the first steps of its warm-up.
    options = {'lr': 7e-8, 'betas': (0.9, 0.999), 'eps': 1e-6, 'weight_decay': 0.01}
    optimizer = torch.optim.AdamW(model.parameters(), fused=device == 'cuda', **options)

    def step(tokens_BN: Tensor, targets_BN: Tensor, weights_BN: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss, total = 0.0, weights_BN.sum().clamp(min=1.0)
        for tokens, targets, weights in zip(
            *(x.chunk(cell.spec.accumulation_steps) for x in (tokens_BN, targets_BN, weights_BN)), strict=True
        ):
            part = (losses(tokens, targets) * weights.flatten()).sum() / total
            part.backward()
            loss = loss + part.detach()
        optimizer.step()
        return loss

    return step


def _forward(cell: Cell, model: nn.Module, device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    losses = _token_losses(cell, model, device)

    @torch.no_grad()
    def forward(tokens_BN: Tensor, targets_BN: Tensor, weights_BN: Tensor) -> Tensor:
        del weights_BN
        return losses(tokens_BN, targets_BN).mean()

    return forward


def _flash_lucidrains(config: ConfigDict, cell: Cell) -> nn.Module:
    from flash_pytorch import FLASHTransformer

    return FLASHTransformer(
        num_tokens=cell.vocab_size,
        dim=config.model_dim,
        depth=config.num_layers,
        group_size=config.chunk_size,
        query_key_dim=config.query_key_dim,
        expansion_factor=config.expansion_factor,
        causal=cell.causal,
    )


class TransformerPlusPlus(nn.Module):
    """Pre-norm Transformer with RoPE and GEGLU, embedding and head tied: our `transformer_plus_plus` in PyTorch."""

    def __init__(self, config: ConfigDict, cell: Cell):
        super().__init__()
        d = config.model_dim
        self.embedding = nn.Embedding(cell.vocab_size, d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList([_Block(config, causal=cell.causal) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(d)
        half = config.head_dim // 2
        angles_NK = torch.arange(cell.context)[:, None] * ROPE_BASE ** (-torch.arange(half) / half)
        self.register_buffer('cos_NK', angles_NK.cos(), persistent=False)
        self.register_buffer('sin_NK', angles_NK.sin(), persistent=False)

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Returns logits [B, N, V]."""
        x_BND = self.embedding(tokens_BN)
        for block in self.blocks:
            x_BND = block(x_BND, self.cos_NK, self.sin_NK)
        return F.linear(self.norm(x_BND), self.embedding.weight)


class _Block(nn.Module):
    def __init__(self, config: ConfigDict, *, causal: bool):
        super().__init__()
        d, width, self.heads, self.causal = config.model_dim, config.feed_forward_dim, config.num_heads, causal
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * width), nn.Linear(width, d)

    def forward(self, x_BND: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BND)).unflatten(-1, (3, self.heads, -1))
        q_BHNK, k_BHNK, v_BHNK = qkv.permute(2, 0, 3, 1, 4).unbind()
        q_BHNK, k_BHNK = (_rotate(x, cos_NK, sin_NK) for x in (q_BHNK, k_BHNK))
        o_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK, is_causal=self.causal)
        x_BND = x_BND + self.out(o_BHNK.transpose(1, 2).flatten(2))
        gate, value = self.up(self.feed_forward_norm(x_BND)).chunk(2, dim=-1)
        return x_BND + self.down(F.gelu(gate, approximate='tanh') * value)


def _rotate(x_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    x1, x2 = x_BHNK.chunk(2, dim=-1)
    return torch.cat([x1 * cos_NK - x2 * sin_NK, x2 * cos_NK + x1 * sin_NK], dim=-1).type_as(x_BHNK)


_BUILDERS = {'torch_flash_lucidrains': _flash_lucidrains, 'torch_transformer_plus_plus': TransformerPlusPlus}
