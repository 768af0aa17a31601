"""What the attentions with weights f(q.k / n + b) share: quadratic attention, and the local branch of mixed chunk."""

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.attentions.record import Attention
from gau.models.costs import BYTES, Count, Shape, saved
from gau.models.fields import Filler, choice, count, number

# Up to here the relative bias of a gated unit is a Toeplitz table, beyond it is rotary (docs/paper.md section 2).
TOEPLITZ_LIMIT = 512

SCORING_FIELDS = {
    'attention_function': choice(
        'f: relu(x)^2 (default of GAUs), softmax (default of Transformers), softmax of scores times log n / log 512 '
        'for n keys that the query sees, Laplace, or two smooth forms of relu^2.',
        *('relu2', 'softmax', 'softmax_plus', 'laplace', 'softplus2', 'smooth_relu2'),
        default='relu2',
    ),
    'normalizer': choice(
        'n in f(q.k / n + b), not for softmax, which divides by sqrt(S). "paper": length of the sequence (of the '
        'document, where they are packed; C in chunks). "fixed": `normalizer_length`. "visible": keys that the query '
        'sees. "su": f(q.k / sqrt(S) + b) / keys that the query sees. Default "paper", but "fixed" for causal '
        'quadratic attention, where "paper" lets later tokens change what was computed for a prefix.',
        *('paper', 'fixed', 'visible', 'su'),
    ),
    'normalizer_length': count('The constant of normalizer=fixed.', default=512),
    'temperature': choice('"learned": q.k times one learned number for each layer.', 'learned', 'none', default='none'),
    'relative_bias': choice(
        'b: a Toeplitz table, two rotated vectors, or none. Default in GAUs: a table up to 512 positions (in chunks: '
        'of a chunk), else rotary; in Transformers none.',
        *('toeplitz', 'rotary', 'none'),
    ),
    'relative_bias_length': count(
        'Positions that the table serves, or for which relative_bias_init=mean starts a rotary bias; default the '
        'context, in chunks C.'
    ),
    'relative_bias_init': choice(
        'Where b starts, for relu2. "mean" (default): alike for all distances, so large that a weight starts as '
        'relative_bias_scale^2 / n, n the positions (docs/results/quality.md). "normal", the paper\'s: N(0, 0.02); '
        'default with normalizer=su, which divides the weights by itself.',
        *('mean', 'normal'),
    ),
    'relative_bias_scale': number(
        'Of relative_bias_init=mean.', default=2.0, wrong=lambda value: not value > 0, right='positive'
    ),
}


def _has_length(bias: str, start: str | None) -> bool:
    """Whether a relative bias depends on how many positions it is made for."""
    return bias == 'toeplitz' or (bias == 'rotary' and start == 'mean')


class ScoredAttention(Attention):
    """Base class of the records."""

    def positions(self, config: ConfigDict, context: int) -> int:
        """Returns between how many positions there are weights."""
        raise NotImplementedError

    def idle_fields(self, config: ConfigDict) -> dict[str, str]:
        """See the base class."""
        idle = {}
        function = config.attention_function or self.fields['attention_function'].default
        if function != 'relu2':
            idle['relative_bias_init'] = f'it is the start of the weights of relu2, and this is {function}'
        if (config.relative_bias or self.fields['relative_bias'].default) == 'none':
            idle['relative_bias_init'] = 'there is no relative bias'
        start = None if 'relative_bias_init' in idle else self._start(config)
        if start != 'mean':
            idle['relative_bias_scale'] = f'it is of relative_bias_init=mean, and this is {start}'
        if function in ('softmax', 'softmax_plus'):
            idle |= dict.fromkeys(('normalizer', 'normalizer_length'), f'{function} normalises by itself')
        if config.normalizer not in ('fixed', None):
            idle['normalizer_length'] = f'it is the constant of normalizer=fixed, and this is {config.normalizer}'
        if not _has_length(config.relative_bias or 'toeplitz', start):
            idle['relative_bias_length'] = f'it is the length of a toeplitz table, and this is {config.relative_bias}'
        return idle

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        fill('normalizer', 'paper')
        if fill.config.normalizer != 'fixed':
            fill.drop('normalizer_length')
        positions = self.positions(fill.config, context)
        by_length = 'toeplitz' if positions <= TOEPLITZ_LIMIT else 'rotary'
        fill('relative_bias', self.fields['relative_bias'].default or by_length)
        fill('relative_bias_init', self._start(fill.config))
        if _has_length(fill.config.relative_bias, fill.config.relative_bias_init):
            fill('relative_bias_length', positions)
        else:
            fill.drop('relative_bias_length')

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """See the base class."""
        if config.relative_bias_init == 'mean' and config.normalizer == 'su':
            raise UserError(
                'model.relative_bias_init=mean: normalizer=su divides the weights by itself; use another one'
            )
        # relu^2 of a q.k of order 1e-4 is no signal; the other functions are not 0 at 0 (docs/paper.md 7, trap 2).
        alone = self.pairs(config) == ('direct',) and config.attention_function == 'relu2'
        if alone and config.relative_bias == 'none' and config.gamma_init == 'normal':
            raise UserError(
                'model.gamma_init=normal without a relative_bias leaves the layer dead; use gamma_init=ones'
            )

    def _start(self, config: ConfigDict) -> str:
        """Returns where b starts, if it is there at all."""
        return config.relative_bias_init or ('normal' if config.normalizer == 'su' else 'mean')

    def core_fields(self, config: ConfigDict, *, heads: int, width: int) -> dict:
        """Returns the attributes of `gau.layers.quadratic.QuadraticCore` but for those of its base class."""
        from gau.ops.scores import Scoring

        names = ('temperature', 'relative_bias', 'relative_bias_length')
        fields = {name: config[name] for name in names if config[name] is not None}
        if config.attention_function is not None:
            fields['scoring'] = Scoring(config.attention_function, config.normalizer, config.normalizer_length or 512)
        if config.relative_bias_init == 'mean':
            fields['relative_bias_start'] = config.relative_bias_scale
        return fields | {'num_heads': heads, 'width': width}

    def count_scoring(self, config: ConfigDict, shape: Shape, *, positions: int) -> Count:
        """The parameters of temperature and relative bias, and the matrix of the bias between `positions`."""
        numbers = {'toeplitz': 2 * (config.relative_bias_length or 0) - 1, 'rotary': 2 * shape.width}
        bias = numbers.get(config.relative_bias, 0)
        # All pairs of positions, over the tokens of one sequence.
        matrix = (bias > 0) * shape.heads * positions**2 / shape.context * max(4, BYTES[config.dtype])
        return Count(shape.heads * bias + (config.temperature == 'learned'), 0, matrix)

    def count_weights(self, config: ConfigDict, shape: Shape, *, seen: float, matrix: float) -> Count:
        """The matmuls of a query with `seen` keys and values, and `matrix` weights that are saved."""
        flops = 2 * shape.heads * seen * (shape.width + shape.value_width)
        return Count(0, flops, 0) + saved(config, 0, matrix=matrix)
