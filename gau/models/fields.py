"""Fields of a model's config: their types, defaults and checks. The record that has a field declares it."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gau.errors import UserError, did_you_mean

# Numbers that are not counts are factors of a few units; a larger one is a slip, and infinity makes no width.
_LARGEST_FACTOR = 1000
# Counts are sizes of arrays.
_LARGEST_COUNT = 2**31 - 1


class Field(NamedTuple):
    """One field of the model's config.

    Attributes:
      kind: type of its values: int, float or str.
      doc: what it means, for whoever sets it.
      default: None: it depends on other fields, and a record's `fill` says how.
      choices: the values of a str.
      wrong: returns whether a number is out of range, and the range in words.
      most: of an int.
    """

    kind: type
    doc: str
    default: Any = None
    choices: tuple[str, ...] = ()
    wrong: tuple[Callable[[Any], bool], str] = (lambda value: False, '')
    most: int = _LARGEST_COUNT

    def check(self, name: str, value: Any) -> None:
        """Raises UserError if the field `name` cannot have the value."""
        if (name, value) in GONE_VALUES:
            raise UserError(f'model.{name}={value} does not exist{_gone(GONE_VALUES[name, value])}')
        if self.choices:
            check_choice(f'model.{name}', value, self.choices)
        if self.wrong[0](value):
            raise UserError(f'model.{name} must be {self.wrong[1]}, not {value}')
        most = {float: _LARGEST_FACTOR, int: self.most}.get(self.kind)
        if most is not None and not abs(value) <= most:
            raise UserError(f'model.{name}={value} is too large: want at most {most}')


def choice(doc: str, *choices: str, default: str | None = None) -> Field:
    """Returns a field with a word of `choices` as value."""
    return Field(str, doc, default, choices)


def count(doc: str, *, default: int | None = None, most: int = _LARGEST_COUNT) -> Field:
    """Returns a field with a whole number from 1 on as value."""
    return Field(int, doc, default, wrong=(lambda value: value < 1, 'at least 1'), most=most)


def number(doc: str, *, default: float, wrong: Callable[[float], bool], right: str) -> Field:
    """Returns a field with a number as value; `right` says in words what is not `wrong`."""
    return Field(float, doc, default, wrong=(wrong, right))


def table(**entries: Any) -> Mapping[str, Any]:
    """Returns a table that cannot be changed."""
    return MappingProxyType(entries)


def with_defaults(fields: Mapping[str, Field], **defaults: Any) -> dict[str, Field]:
    """Returns the fields with other defaults."""
    return {**fields, **{name: fields[name]._replace(default=default) for name, default in defaults.items()}}


class Filler:
    """Sets the fields of a config that are open and that its model has.

    Attributes:
      config: the config.
      defaults: the default of every field that applies to the model; None where it depends on others.
      chosen: names of the fields that somebody had set.
    """

    def __init__(self, config: ConfigDict, defaults: dict[str, Any]):
        self.config, self.defaults = config, defaults
        self.chosen = frozenset(field for field in config if config[field] is not None)

    def __call__(self, field: str, value: Any) -> None:
        """Sets a field, if it applies and is open."""
        if field in self.defaults and self.config[field] is None:
            self.config[field] = value

    def drop(self, field: str) -> None:
        """Takes away a field that has no meaning beside the others."""
        self.defaults.pop(field, None)


def check_choice(what: str, value: Any, choices: Any) -> None:
    """Raises UserError unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f'{what}={value} does not exist{did_you_mean(value, choices)}')


class Gone(NamedTuple):
    """A field that lost and was taken away; configs of older runs have it.

    Attributes:
      unused: the value with which such a config still means what it did.
      beside: a field that stored configs have unless they are older than this one.
      page: that of docs/results, which says what the field was worth and names a commit that has it.
      applied: says of a model, by its fields, whether it had the field; None: where `beside` has a value.
    """

    unused: Any
    beside: str
    page: str
    applied: Callable[[Mapping[str, Any]], bool] | None = None

    def stood(self, model: Mapping[str, Any]) -> Any:
        """Returns what a model that made no use of the field would have in its place, None where it did not apply."""
        applied = self.applied(model) if self.applied else model[self.beside] is not None
        return self.unused if applied else None


def _has_state_without_gate(model: Mapping[str, Any]) -> bool:
    # (Gates of the branch that docs/results/quality_memory.md tells of had other names, and no decay beside them.)
    other_gate = model['decay_gate'] is None and model.get('local_window') is not None
    return model.get('branches') in ('both', 'global') and model['decay_gate'] != 'scalar' and not other_gate


GONE = {
    'head_decay': Gone(0.0, 'num_heads', 'heads'),
    'global_norm': Gone('none', 'decay_gate', 'quality_keys'),
    'linear_start': Gone('direct', 'decay_gate', 'quality_keys'),
    'global_decay': Gone(1.0, 'decay_gate', 'quality_memory', _has_state_without_gate),
}
# Values of fields that are still there, and the page of each.
GONE_VALUES = {('decay_gate', 'keys'): 'quality_memory'}


def _gone(page: str) -> str:
    return f'; it is gone, docs/results/{page}.md names a commit that has it'


def unknown(name: str, fields: Iterable[str]) -> str:
    """Says of a name that is none of the fields of `model` what became of it, or which field is nearest."""
    if name in GONE:
        return _gone(GONE[name].page)
    return did_you_mean(name, fields)


def without_gone(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored model config without fields that are gone, as far as it made no use of them."""
    return {name: value for name, value in model.items() if name not in GONE or value not in (None, GONE[name].unused)}


# Fields of every model.
COMMON = {
    # Layers are gone through one by one before anything is built.
    'num_layers': count(
        'Blocks: GAUs, or pairs of attention and feed-forward; by default what `size` says.', most=10_000
    ),
    'model_dim': count('D; by default what `size` says.'),
    'norm': choice('Norm of the layers and before the head.', 'scale_norm', 'layer_norm', 'rms_norm'),
    'norm_placement': choice(
        '"pre": x + f(norm(x)), one norm before the head; "post": norm(x + f(x)); "sandwich": x + norm(f(norm(x))), '
        'the two norms apart, one norm before the head.',
        *('pre', 'post', 'sandwich'),
        default='pre',
    ),
    'absolute_position': choice(
        'Added to the embedding: a sinusoid scaled by one learned number, or nothing.',
        *('sinusoid', 'none'),
        default='sinusoid',
    ),
    'output_layer': choice(
        'What makes logits of the last hidden states: the embedding transposed ("tied"), or a matrix of its own.',
        *('tied', 'own'),
        default='tied',
    ),
    'rope': choice(
        'Which queries and keys are rotated by position: all; those of the attention inside chunks alone; none.',
        *('rotary', 'local', 'none'),
        default='rotary',
    ),
    'short_convolution': Field(
        int,
        'W: the W tokens before each one that a convolution adds to what a layer reads, column by column; in '
        'bidirectional models W / 2 before and W / 2 after; 0: none.',
        0,
        wrong=(lambda value: value < 0, 'at least 0'),
    ),
    'dropout_rate': number(
        'On embeddings and on what a layer adds to the residual stream.',
        default=0.0,
        wrong=lambda value: not 0 <= value < 1,
        right='in [0, 1)',
    ),
    'dtype': choice(
        'Compute type; float64 is for tests. Parameters are float32 or better.',
        *('bfloat16', 'float32', 'float64'),
        default='bfloat16',
    ),
    'layer_stack': choice(
        '"unrolled" is faster, "scan" compiles faster; its layers must be alike.',
        *('unrolled', 'scan'),
        default='unrolled',
    ),
    'remat': choice(
        'What a block saves for the backward pass: "none": all of it; "full": its input alone; "dots": the results of '
        'matmuls; "dots_no_batch": those of matmuls with weights alone.',
        *('none', 'full', 'dots', 'dots_no_batch'),
        default='none',
    ),
    'impl': Field(
        str,
        'Implementation of the attention, one of its record; "auto" takes the fastest that works where the model is '
        'built (`gau.models.implementations`).',
        'auto',
    ),
    'vocab_loss_slice': count(
        'Positions of a sequence that the loss scores against the vocabulary at once, at most.', default=4096
    ),
    'num_heads': count('H. GAU: 1 by default, divides E. Transformers: D / 64 by default.'),
}
