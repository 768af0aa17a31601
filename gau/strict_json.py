"""JSON that every reader takes, with the numbers that JSON has no words for: not a number, and the infinities.

They are written as the strings "NaN", "Infinity" and "-Infinity", as Protocol Buffers write them; pandas, JavaScript's
`Number` and Python's `float` read these as the numbers. `null` is a number that there is not, such as the loss of a
split too small to evaluate. (Python's own writer puts a bare NaN, which jq and browsers refuse or misread.)
"""

import json
import math
from typing import Any

_WORDS = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


def dumps(tree: Any, **options: Any) -> str:
    """Returns the JSON of a tree of dicts, lists, tuples and scalars; options are those of `json.dumps`."""
    return json.dumps(_worded(tree), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Reads what `dumps` wrote, and JSON with a bare NaN or Infinity, as older work directories have.

    Raises:
      ValueError: it is not JSON.
    """
    return _numbered(json.loads(text))


def _worded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _worded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_worded(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return 'NaN' if math.isnan(tree) else 'Infinity' if tree > 0 else '-Infinity'
    return tree


def _numbered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _numbered(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbered(value) for value in tree]
    return _WORDS.get(tree, tree) if isinstance(tree, str) else tree
