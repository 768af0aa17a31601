"""The title of a document from the beginning of its text."""

from typing import Any

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.objectives.halves import Halves


class Titles(Halves):
    """As `Halves`, with the title as target, and as source the text without the title it may begin with."""

    @property
    def rows(self) -> Any:
        """How documents become rows."""
        from gau.data import pairs

        return pairs.TITLES

    def resolve_data(self, config: ConfigDict) -> ConfigDict:
        """See the base class. Raises UserError for sources whose documents have no fields."""
        from gau.data import config as data_config

        config = super().resolve_data(config)
        given = [*data_config.sources(config), *filter(None, (config.valid_source, config.test_source))]
        for source in given:
            if data_config.source_kind(source) not in ('jsonl', 'embedded'):
                raise UserError(
                    f'data.source: "{source}" has no titles, which are a field of jsonl:GLOB and the names of embedded'
                )
        return config

    def places_per_epoch(self, config: ConfigDict, tokenizer: Any) -> int:
        """A row for each document."""
        from gau.data import sources

        return sum(map(len, sources.open_split(config, 'train'))) * config.context
