"""Data sets of TensorFlow Datasets that were built as ArrayRecord files, read without TensorFlow or a network.

The directory is found by its name, DATA_DIR/NAME[/CONFIG]/VERSION, rather than through the library's registry, which
runs the data set's own building code and may ask a server.
"""

from typing import Any

from gau.data.documents import Document, nested
from gau.errors import UserError, did_you_mean

# Where the text is not in a field called `text`.
_FIELDS = {'pg19': 'book_text'}
# The names of splits that mean our `valid`.
_VALID = ('validation', 'valid', 'dev')


def splits(name: str, data_dir: str | None) -> list[str]:
    """Returns the splits of a built data set; `validation` is called `valid`.

    Raises:
      UserError: no such data set in the directory.
    """
    return list(_split_names(_builder(name, data_dir)))


def identity(name: str, data_dir: str | None) -> str:
    """Returns the data set's full name with its version, and documents and bytes of every split.

    Raises:
      UserError: no such data set in the directory.
    """
    info = _builder(name, data_dir).info
    sizes = [f'{split}: {part.num_examples} in {part.num_bytes} bytes' for split, part in sorted(info.splits.items())]
    return ', '.join([info.full_name, *sizes])


class TfdsText:
    """The documents of one split.

    Args:
      name: NAME[/CONFIG][:VERSION].
      split: one of `splits(name, data_dir)`.
      field: of the example (None: `text`, or what is known of this data set).
      data_dir: where data sets lie (None: tfds's own default).

    Raises:
      UserError: no such data set or field; built in another format than ArrayRecord.
    """

    def __init__(self, name: str, split: str, *, field: str | None, data_dir: str | None) -> None:
        builder = _builder(name, data_dir)
        self._name = name
        self._field = field or _FIELDS.get(name.partition('/')[0].partition(':')[0], 'text')
        features = builder.info.features
        try:
            nested(features, self._field)
        except KeyError as error:
            raise UserError(
                f'tfds:{name} has no field "{self._field}" (data.text_field){did_you_mean(self._field, features)}'
            ) from error
        try:
            self._examples = builder.as_data_source(split=_split_names(builder)[split])
        except NotImplementedError as error:
            raise UserError(
                f'tfds:{name} in {builder.data_path} is built as {builder.info.file_format.value}: '
                'build it with file_format=array_record, or convert it with tfds convert_format'
            ) from error

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Document | None:
        text = nested(self._examples[index], self._field)
        if isinstance(text, bytes):
            try:
                text = text.decode('utf-8')
            except UnicodeDecodeError as error:
                raise UserError(f'tfds:{self._name}: example {index}: not UTF-8: {error.reason}') from error
        if not isinstance(text, str):
            raise UserError(f'tfds:{self._name}: the field "{self._field}" is {type(text).__name__}, not text')
        return (
            Document(text=text, place=lambda: f'tfds:{self._name}: example {index}')
            if text and not text.isspace()
            else None
        )


def _split_names(builder: Any) -> dict[str, str]:
    return {'valid' if split in _VALID else split: split for split in builder.info.splits}


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    root = tfds.core.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    path, _, version = name.partition(':')
    directory = root / path
    if not version and directory.exists():
        found = [entry.name for entry in directory.iterdir() if (entry / 'dataset_info.json').exists()]
        version = max(found, key=_version_key, default='')
    if not version or not (directory / version / 'dataset_info.json').exists():
        raise UserError(
            f'tfds:{name} is not built in {root} (data.tfds_dir): build it with '
            '"tfds build --file_format=array_record", see requirements-prepare.txt'
        )
    return tfds.builder_from_directory(directory / version)


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split('.'))
