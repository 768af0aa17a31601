"""From the type of an entry in `config.evaluators` to its class. Light (no JAX), until a class is asked for."""

import importlib
from pathlib import Path

from gau.errors import UserError, did_you_mean

# Files here that hold no evaluator.
_OTHER_FILES = ('__init__', 'evaluator', 'registry')


def types() -> list[str]:
    """Returns the types that an entry may name, besides `module:Class`: the names of the files here."""
    return sorted(path.stem for path in Path(__file__).parent.glob('*.py') if path.stem not in _OTHER_FILES)


def check_type(where: str, name: str) -> None:
    """Raises UserError unless `name` is one of `types` or looks like `module:Class`; imports nothing."""
    if ':' not in str(name) and name not in types():
        raise UserError(
            f'{where}="{name}" is unknown{did_you_mean(str(name), types())}; your own is written "module:Class"'
        )


def find(where: str, name: str) -> type:
    """Returns the class of a type: for `whole_documents` that is WholeDocuments in gau/evaluation/whole_documents.py.

    Raises:
      UserError: there is none.
    """
    check_type(where, name)
    camel_case = ''.join(word.capitalize() for word in name.split('_'))
    module, _, attribute = name.partition(':') if ':' in name else (f'gau.evaluation.{name}', ':', camel_case)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f'{where}="{name}" cannot be imported: {error}') from error
