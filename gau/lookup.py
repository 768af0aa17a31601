"""Classes that a config names: by their file in a package of this library, or as `module:Class` anywhere else.

The class of a file is the one of the same name, whatever the case: `whole_documents` holds WholeDocuments, `lm` LM.
Light: nothing is imported until a class is asked for.
"""

import importlib
from pathlib import Path

from gau.errors import UserError, did_you_mean

# Files that hold no class to be named, by package.
_OTHER_FILES = {'evaluation': ('evaluator',), 'objectives': ('objective', 'text')}


def names(package: str) -> list[str]:
    """Returns the names of a package's classes: `names('evaluation')` those of gau/evaluation/."""
    files = (Path(__file__).parent / package).glob('*.py')
    return sorted(path.stem for path in files if path.stem not in ('__init__', *_OTHER_FILES[package]))


def check(field: str, name: str, package: str) -> None:
    """Raises UserError unless `name`, the value of the config's `field`, is in `names` or looks like `module:Class`."""
    if ':' not in name and name not in names(package):
        raise UserError(
            f'{field}="{name}" is unknown{did_you_mean(name, names(package))} (your own is written "module:Class")'
        )


def find(field: str, name: str, package: str) -> type:
    """Returns the class.

    Raises:
      UserError: there is none.
    """
    check(field, name, package)
    module, colon, attribute = name.partition(':')
    try:
        module = importlib.import_module(module if colon else f'gau.{package}.{name}')
        if not colon:
            attribute = next(own for own in vars(module) if own.lower() == name.replace('_', ''))
        found = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        # (ValueError: there is no name before the colon.)
        raise UserError(f'{field}="{name}" cannot be imported: {error}') from error
    if not isinstance(found, type):
        raise UserError(f'{field}="{name}" is no class, but {type(found).__name__}')
    return found
