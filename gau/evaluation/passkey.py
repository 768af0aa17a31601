"""Passkey: whether a model tells a number that stood once in a long text, by how far back it stood and how long it is.

After Mohtashami & Jaggi (2023), "Landmark Attention", section 4.2, but that the text around is held-out text of the
run's own, and no instruction comes first: the models here only continue text.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gau import plots
from gau.data import examples, sources
from gau.errors import UserError
from gau.evaluation.evaluator import BatchEvaluator, Case, Metrics, Run
from gau.models.language_model import LanguageModel
from gau.objectives.objective import Batch

# No punctuation stands behind the number, which some tokenizers would cut otherwise then.
NEEDLE = ' The pass key is {key} and no other. Remember that {key} is the pass key. '
QUESTION = ' What is the pass key? The pass key is '
# The text around a needle is at least so many times as long as needle, question and key together.
LEAST_TEXT = 2
SEED = 1


class Passkey(BatchEvaluator):
    """Accuracy and loss (nats) of the tokens of a number of `digits` digits, at a row's end, that stood in it before.

    A row of N tokens is BOS, held-out text with a needle in it that tells the number, and a question that ends before
    the number. Every text is read with the needle at `depths` places, from its start (depth 0) to its end (depth 1),
    and once without: `loss_without` says what a model knows without finding anything. `keys` is the share of numbers
    all of whose tokens are the likeliest ones, so that a greedy continuation gives them.

    Fields of an entry: `digits`, `depths`, and `texts`, how many there are. They are cut out of the first `max_tokens`
    tokens of the split, documents end to end, and overlap where these are fewer.
    """

    options: ClassVar[Mapping[str, int]] = {'texts': 32, 'depths': 5, 'digits': 5}
    headline = ('accuracy', 'loss')
    columns = ('context', 'tokens', 'loss', 'loss_without', 'accuracy', 'keys')
    figure = 'accuracy_by_depth'

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes what every evaluator does.

        Raises:
          UserError: see `Evaluator`; the model does not continue text; a field has a value without a meaning.
        """
        super().__init__(run, name, entry)
        if not isinstance(run.model, LanguageModel) or not run.model.causal:
            raise UserError(f'evaluators.{name}.type={entry.type} is for causal language models: a text is continued')
        self.check_range('texts', 1, 100_000)
        self.check_range('depths', 2, 1000)
        self.check_range('digits', 1, 18)  # as many as any number of 64 bits has

    def arrays(self, context: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Inputs, targets and weights [1, N]; only the last K places have weights."""
        dtypes = {'inputs': np.int32, 'targets': np.int32, 'weights': np.float32}
        return {name: ((1, context), dtype) for name, dtype in dtypes.items()}

    def rows(self, case: Case, batch_size: int) -> Iterator[Batch]:
        """Yields batches of every text without a needle and with it at every depth, one after the other."""
        self.check_context(case.context)
        text_T, made = self._text(case.split), []
        count = self.entry.texts * (self.entry.depths + 1)
        # The last batch is filled up with the last row, without weight.
        for number in range(-(-count // batch_size) * batch_size):
            if number < count:
                text, depth = divmod(number, self.entry.depths + 1)
                start = text * len(text_T) // self.entry.texts
                row = self._words.row(text, depth - 1, self.entry.depths, text_T, start, case.context)
            else:
                row = {**row, 'weights': np.zeros_like(row['weights'])}
            made.append(row)
            if len(made) == batch_size:
                yield {name: np.stack([row[name] for row in made]) for name in made[0]}
                made = []

    def outputs(self, params: Any, batch: Mapping[str, jax.Array]) -> Any:
        """Returns nats of the last K places, [B, K] float32, and whether the likeliest token is the target, bool."""
        model, last = self.run.model, self._words.answer
        h_BND = model.apply({'params': params}, batch['inputs'], method='hidden')
        logits_BKV = model.apply({'params': params}, h_BND[:, -last:], method='logits')
        targets_BK = batch['targets'][:, -last:]
        nll_BK = -jnp.take_along_axis(jax.nn.log_softmax(logits_BKV), targets_BK[..., None], axis=-1)[..., 0]
        return nll_BK, jnp.argmax(logits_BKV, axis=-1) == targets_BK

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields loss, loss_without, accuracy, keys, tokens, context, and `by_depth`, see `_by_depth`."""
        last = self._words.answer
        parts = [(*outputs, batch['weights'][:, -last:]) for batch, outputs in self.batches(params, case, cancelled)]
        shape = self.entry.texts, self.entry.depths + 1
        # [texts, 1 + depths, K]; the first of every text is without a needle.
        nll, right, weights = (
            np.concatenate(part)[: shape[0] * shape[1]].reshape(*shape, -1) for part in zip(*parts, strict=True)
        )
        nll, weights = nll.astype(np.float64), weights > 0
        found = weights[:, 1:]
        yield 'loss', float(nll[:, 1:][found].mean())
        yield 'loss_without', float(nll[:, 0][weights[:, 0]].mean())
        yield 'accuracy', float(right[:, 1:][found].mean())
        yield 'keys', float((right | ~weights)[:, 1:].all(-1).mean())
        yield 'tokens', int(found.sum())
        yield 'context', case.context
        yield 'by_depth', list(self._by_depth(nll, right, weights, case.context))

    def draw(self, measured: Mapping[Case, Metrics], path: Path, *, title: str) -> None:
        """Draws the accuracy over the depth, a curve for each case."""
        figure, axes = plots.figure('place of the number in the text (1: its end)', 'accuracy', title)
        for case, metrics in measured.items():
            rows = metrics['by_depth']
            label = f'{case.split} at {metrics["context"]}'
            axes.plot([row['depth'] for row in rows], [row['accuracy'] for row in rows], marker='.', label=label)
        axes.set_ylim(0, 1)
        axes.legend()
        plots.save(figure, path)

    def _by_depth(
        self, nll: np.ndarray, right: np.ndarray, weights: np.ndarray, context: int
    ) -> Iterator[dict[str, Any]]:
        """Yields {depth, distance (mean, tokens from the number's end to its question's), loss, accuracy, keys}."""
        for depth in range(self.entry.depths):
            at = slice(None), depth + 1
            distances = [
                self._words.distance(text, depth, self.entry.depths, context) for text in range(self.entry.texts)
            ]
            yield {
                'depth': depth / (self.entry.depths - 1),
                'distance': round(float(np.mean(distances))),
                'loss': float(nll[at][weights[at]].mean()),
                'accuracy': float(right[at][weights[at]].mean()),
                'keys': float((right | ~weights)[at].all(-1).mean()),
            }

    def check_context(self, context: int) -> None:
        """See the base class: whether a row holds what it must."""
        if context < self._words.shortest:
            raise UserError(
                f'evaluators.{self.name}: a pass key, its question and some text between them want at least '
                f'{self._words.shortest} tokens of context, not {context}'
            )

    def _text(self, split: str) -> np.ndarray:
        """Returns the tokens of a split's documents end to end, without specials, up to max_tokens in all."""
        parts, left = [], self.entry.max_tokens or np.inf
        for documents in sources.open_split(self.run.config.data, split):
            for i in range(len(documents)):
                document = documents[i]
                if document is None or left <= 0:
                    continue
                tokens = examples.encode(document, self.run.tokenizer)
                parts.append(tokens[: int(min(left, len(tokens)))])
                left -= len(parts[-1])
        return np.concatenate(parts)

    @cached_property
    def _words(self) -> '_Words':
        rng = np.random.default_rng(SEED)
        lowest = 10 ** (self.entry.digits - 1)
        numbers = rng.integers(lowest, 10 * lowest, self.entry.texts)
        return _Words.of(self.run.tokenizer, [str(number) for number in numbers])


class _Words(NamedTuple):
    """The tokens that rows are made of beside text, of every text's number.

    needles, questions, keys: tokens of each; a question ends with the last token that does not depend on its number.
    ends: how many tokens of a needle are behind the first mention of its number.
    answer: K, tokens of the longest key. shortest: tokens of the shortest row that holds needle, text and question.
    """

    bos_id: int
    needles: list[np.ndarray]
    ends: list[int]
    questions: list[np.ndarray]
    keys: list[np.ndarray]
    answer: int
    shortest: int

    @classmethod
    def of(cls, tokenizer: Any, numbers: list[str]) -> '_Words':
        needles, ends, questions, keys = [], [], [], []
        for number in numbers:
            # A number with another first digit, and other digits behind it, shows which tokens tell this one.
            other = ''.join(str(9 - int(digit)) for digit in number)
            whole, changed = (tokenizer.encode(f'{QUESTION}{key}') for key in (number, other))
            asked = _shared(whole, changed)
            questions.append(whole[:asked])
            keys.append(whole[asked:])
            needle = tokenizer.encode(NEEDLE.format(key=number))
            needles.append(needle)
            told = tokenizer.encode(NEEDLE.partition('{key}')[0] + number)
            ends.append(len(needle) - _shared(needle, told))
        longest = max(len(needle) + len(question) for needle, question in zip(needles, questions, strict=True))
        answer = max(map(len, keys))
        return cls(
            *(tokenizer.bos_id, needles, ends, questions, keys, answer),
            shortest=(LEAST_TEXT + 1) * (longest + answer) + 1,
        )

    def room(self, text: int, context: int) -> int:
        """Returns how many tokens of a row are text."""
        return context - 1 - len(self.needles[text]) - len(self.questions[text]) - (len(self.keys[text]) - 1)

    def before(self, text: int, depth: int, depths: int, context: int) -> int:
        """Returns how many of them stand before the needle."""
        return round(self.room(text, context) * depth / (depths - 1))

    def distance(self, text: int, depth: int, depths: int, context: int) -> int:
        """Returns how many tokens stand between a number's first mention in its needle and the answer's first token."""
        after = self.room(text, context) - self.before(text, depth, depths, context)
        return self.ends[text] + after + len(self.questions[text])

    def row(self, text: int, depth: int, depths: int, text_T: np.ndarray, start: int, context: int) -> Batch:
        """Returns a row: inputs, targets and weights [N]; a negative depth has text in the needle's place."""
        needle, question, key = self.needles[text], self.questions[text], self.keys[text]
        room = self.room(text, context)
        if depth < 0:
            before, needle = room + len(needle), needle[:0]
            around = text_T.take(range(start, start + before), mode='wrap')
        else:
            before = self.before(text, depth, depths, context)
            around = text_T.take(range(start, start + room), mode='wrap')
        parts = [self.bos_id], around[:before], needle, around[before:], question, key[:-1]
        inputs_N = np.concatenate(parts).astype(np.int32)
        targets_N, weights_N = np.zeros_like(inputs_N), np.zeros(context, np.float32)
        targets_N[-len(key) :], weights_N[-len(key) :] = key, 1
        return {'inputs': inputs_N, 'targets': targets_N, 'weights': weights_N}


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """Returns how many tokens two sequences have in common from their start."""
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differ[0]) if len(differ) else shorter
