"""Whether a directory holds the preparation that is asked for: plans of `prepare`, compared."""

import json
import os
import pathlib
from typing import Any

from gau.errors import UserError

# Options that say what to do with documents that cannot be taken as they are; they may change on the way.
POLICIES = ('bad_lines', 'special_in_text')


def check_same(plan: dict[str, Any], found: dict[str, Any], output: pathlib.Path) -> None:
    """Raises UserError, with what differs, unless the plan `found` in the directory `output` is of the same work."""
    now, found = _wherever_it_lies(plan), _wherever_it_lies(found)
    for key in now:
        if now[key] == found.get(key):
            continue
        here, there = now[key], found.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            changed = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
            here, there = ({name: side.get(name) for name in changed} for side in (here, there))
        what = f'{key}: {_short(there)} there, {_short(here)} now'
        raise UserError(f'{output}: holds tokens of another preparation ({what}): choose another directory')


def _wherever_it_lies(plan: dict[str, Any]) -> dict[str, Any]:
    """Returns a plan, as it reads back from JSON, without directories and without what may change on the way."""
    plan = json.loads(json.dumps(plan))
    options = {name: value for name, value in plan.get('options', {}).items() if name not in POLICIES}
    for field in ('source', 'valid_source', 'test_source'):
        kind, colon, rest = (options.get(field) or '').partition(':')
        if colon and kind != 'tfds':
            options[field] = f'{kind}:{",".join(map(os.path.basename, rest.split(",")))}'
    files = [[os.path.basename(name), *rest] for name, *rest in plan.get('files', [])]
    return plan | {'options': options, 'files': files}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f'{text[:200]}...'
