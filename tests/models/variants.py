"""Every variant of every model, made of its records: a new model, field or choice is among them by itself.

A variant is a model as it is by default, with one field at another value, or with the values that won. A text takes
every choice, a number the next one that the model accepts. A field is tried once for each record that has it, and once
for each attention if it changes what a core is given, as a causal model and as one that is not.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gau.errors import UserError
from gau.models import encoder_decoder, registry
from gau.models.architectures import ARCHITECTURES, BEST_FLASH, Architecture
from gau.models.families import cross
from gau.models.fields import Field
from gau.models.target import Target
from tests.models import tiny
from tests.numerics import random_like

# How parameters start, and how or where the same is computed; dropout is noise.
SAME_NUMBERS = {
    *('gamma_init', 'relative_bias_init', 'relative_bias_scale'),
    *('dtype', 'layer_stack', 'remat', 'impl', 'vocab_loss_slice', 'num_layers', 'model_dim', 'dropout_rate'),
}
# How long the tables are that a longer text would need.
LENGTHS = {'relative_bias_length', 'projection_length', 'normalizer_length'}
# Fields of every model that change what a core is given.
OF_CORES = {'num_heads', 'rope', 'short_convolution'}
# What won, and what it may have beside it.
WON = tuple(tuple((BEST_FLASH | {'chunk_size': 5} | more).items()) for more in ({}, {'far_chunks': 2}))


class Variant(NamedTuple):
    """One of them: the name of its model, an objective of it, and fields with their values."""

    name: str
    objective: str
    fields: tuple[tuple[str, Any], ...] = ()

    def __str__(self):
        """Its name as a parameter of a test."""
        return '-'.join([self.name, self.objective, *(f'{field}={value}' for field, value in self.fields)])

    @property
    def causal(self) -> bool:
        """Whether later tokens are hidden (of an encoder-decoder: in the target)."""
        return self.objective != 'mlm'

    def config(self, **more: Any) -> Any:
        """Its resolved config, of one layer, and `more`."""
        objective = 'mlm' if self.objective == 'mlm' else 'lm'
        return tiny.tiny_config(self.name, objective, **{'num_layers': 1} | dict(self.fields) | more)

    def build(self, **more: Any) -> Any:
        """Its model."""
        config = self.config(**more)
        if self.objective == 'halves':
            return encoder_decoder.build(config, vocab_size=tiny.VOCAB, target=Target('cpu'))
        return registry.build(config, vocab_size=tiny.VOCAB, causal=self.causal)

    def make(self, **more: Any) -> tuple[Any, Any]:
        """Its model and its parameters, of order 1."""
        model = self.build(**more)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int))['params']
        return model, random_like(shapes, 0)


def variants() -> list[Variant]:
    """Returns them all, encoder-decoders included, for each objective that a model has."""
    before = dict(ARCHITECTURES)
    cross.register()
    try:
        return list(_variants())
    finally:
        ARCHITECTURES.clear()
        ARCHITECTURES.update(before)


def _variants() -> Iterator[Variant]:
    tried = set()
    for name, architecture in ARCHITECTURES.items():
        objectives = ('halves',) if isinstance(architecture.family, cross.ReadsSource) else ('lm', 'mlm')
        for objective in objectives:
            if objective == 'lm' and architecture.not_causal:
                continue
            plain = Variant(name, objective)
            yield plain
            yield from _others(plain, architecture, tried)
            if name == 'flash' and objective == 'lm':
                yield from (plain._replace(fields=fields) for fields in WON)


def _others(plain: Variant, architecture: Architecture, tried: set) -> Iterator[Variant]:
    default = plain.config()
    for name, field in architecture.fields.items():
        if name in SAME_NUMBERS | LENGTHS:
            continue
        of_attention = name in architecture.attention.fields or name in OF_CORES
        declared = (id(architecture.attention.fields), name) if of_attention else field
        for values in _values(field, default[name]):
            # The first of them that the model accepts.
            variant = next(filter(_exists, (plain._replace(fields=((name, value),)) for value in values)), None)
            if variant is not None and (key := (declared, variant.fields, plain.causal)) not in tried:
                tried.add(key)
                yield variant


def _exists(variant: Variant) -> bool:
    try:
        variant.config()
    except UserError:
        return False
    return True


def _values(field: Field, default: Any) -> list[tuple[Any, ...]]:
    """Returns groups of values, of each of which one is to be tried."""
    if field.choices:
        return [(choice,) for choice in field.choices if choice != default]
    if field.kind is int:
        # What is switched on by a number is not the same with the least of it: one earlier chunk, or a choice of some.
        return [(1,), (2,)] if field.default == 0 else [((default or 1) + 1, 2 * (default or 1))]
    return [tuple(value for value in (0.5, 2.0, 3.0) if value != default)]
