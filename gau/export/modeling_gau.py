"""GAU, FLASH, FLASH-Quad and Transformer++ (Hua et al. 2022, arXiv 2202.10447) in PyTorch, for `transformers`.

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)     # or AutoModelForMaskedLM

A model is five files, each of which imports none but those named before it: `configuration_gau.py`, `layers_gau.py`,
`attention_gau.py` (the mathematics), `blocks_gau.py` and this one, the whole of it. Tensors are named by their axes:
B batch, N tokens, D model, E expanded, S query/key, G chunks, C chunk, H heads, R roles, V vocabulary, W neighbours,
L columns of a gate (1 or S); a head's part of E and its width are E and S as well.
Documents: `segment_ids` [B, N] are 0 at padding and name the document of every other token; documents are contiguous
and do not see each other. An `attention_mask` is the same with one document. Decoding keeps a state that, in FLASH, has
one size whatever the length; padding in a prompt, on whichever side, is left out of it.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .attention_gau import Attention
from .blocks_gau import Block
from .configuration_gau import GAUConfig
from .layers_gau import Norm, Scale, State, Tokens, angles, wide

if 'cache' not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    raise ImportError('modeling_gau.py needs transformers 5.24 or newer, whose decoding states are called `cache`')


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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
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
