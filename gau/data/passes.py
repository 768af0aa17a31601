"""How often training passes over its text, by the manifests of prepared tokens: nothing else is read for it.

Of text files, and of what tfds has, nobody knows the tokens before all of them are read: of these nothing is said.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import manifest


class Passes(NamedTuple):
    """How often the training documents of one source are passed over.

    Attributes:
      times: so often, by the places of rows that the run fills from this source.
      tokens: of one pass, with the one or two that every document takes beside its own.
      exact: False where rows are padded, which nobody has counted: then it is so often at most.
    """

    times: float
    tokens: int
    exact: bool = True

    def __str__(self) -> str:
        """`6.6`, or `<= 6.6`."""
        number = f'{self.times:,.0f}' if self.times >= 9.95 else f'{self.times:.2g}'
        return number if self.exact else f'<= {number}'

    @property
    def words(self) -> str:
        """`6.6`, or `at most 6.6`."""
        return str(self).replace('<=', 'at most')


def passes(config: ConfigDict, places: int, *, frame: int) -> dict[str, Passes]:
    """Returns how often a run passes over each of its sources whose size is known, by the source's name.

    Args:
      config: the resolved data config. Of a mixture every source fills its share of the rows.
      places: of rows, padding included, that the run trains on.
      frame: places that a document takes beside its own tokens (`gau.data.formats`).

    Raises:
      UserError: a manifest cannot be read.
    """
    sources = data_config.sources(config)
    weights = [weight for weight, _ in data_config.mixture(config)] if config.mixture else [1.0]
    found: dict[str, Passes] = {}
    for source, weight in zip(sources, weights, strict=True):
        kind, _, directory = source.partition(':')
        train = manifest.read(directory).get('splits', {}).get('train') if kind == 'tokens' else None
        if not train or not train.get('documents'):
            continue
        tokens = least = train['tokens'] + frame * train['documents']
        if config.packing == 'document':
            # A document has a row at least.
            least = max(tokens, train['documents'] * config.context)
        times = places * weight / sum(weights) / least
        # The same source may stand twice in a mixture.
        before = found[source].times if source in found else 0.0
        found[source] = Passes(before + times, tokens, exact=config.packing == 'concat')
    return found


def told(passes: Mapping[str, Passes]) -> str:
    """Returns in words how often which text is passed over; nothing where nothing is known."""
    return ', '.join(
        f'{each.words} times over the {each.tokens:,} training tokens of {source}' for source, each in passes.items()
    )
