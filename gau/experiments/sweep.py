"""A sweep: the points that a config program's generators name, each a set of overrides with a short, stable name.

    def sweep_chunk_size():
        for size in (64, 128, 256):
            yield {'model.chunk_size': size}

A point sets fields of the config (`model.chunk_size`) and arguments of the program, with the colon that stands before
them on a command line (`:context`, as in `FILE:context=8192`). Its name is made of both; `name` gives another. Light on
purpose (no JAX).
"""

import ast
import dataclasses
import hashlib
import importlib.util
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from gau.errors import UserError, did_you_mean
from gau.training import config as training_config
from gau.training import durations

Overrides = dict[str, Any]

PREFIX = 'sweep_'
# Directory names stay well below the 255 bytes that file systems allow.
MAX_NAME = 100


def sweep_seed(n: int = 3, first: int = 0) -> Iterator[Overrides]:
    """The sweep `seed` of every config program: n seeds from `first` on. Raises ValueError if that is none."""
    if not isinstance(n, int) or not isinstance(first, int):
        raise ValueError('want whole numbers, how many seeds and the first one')
    if n < 1:
        raise ValueError('want one seed at least')
    yield from ({'seed': seed} for seed in range(first, first + n))


@dataclasses.dataclass(frozen=True)
class Program:
    """A config program and what the command line says besides, which all points have in common.

    Attributes:
      path: of the Python file.
      argument: what stands behind the colon of `--config=FILE:ARGUMENT`, or ''.
      overrides: fields that the command line sets, typed.
    """

    path: str
    argument: str = ''
    overrides: Overrides = dataclasses.field(default_factory=dict)

    def config(self, overrides: Overrides) -> ConfigDict:
        """Returns the config with a point's overrides, resolved and checked.

        Raises:
          UserError: the program or the config refuses something.
        """
        return training_config.resolve(self.open_config(overrides), given=self._split(overrides)[1])

    def open_config(self, overrides: Overrides) -> ConfigDict:
        """Returns the same config before it is resolved: what other fields decide is still None."""
        argument, fields = self._split(overrides)
        config = _get_config(self._module, argument)
        for path, value in fields.items():
            _set(config, path, value)
        durations.keep_given_units(config, fields)
        return config

    def arguments(self, overrides: Overrides) -> list[str]:
        """Returns the command line that gives train.py the config of a point."""
        argument, fields = self._split(overrides)
        config = f'--config={self.path}:{argument}' if argument else f'--config={self.path}'
        return [config, *(f'--config.{path}={value}' for path, value in fields.items())]

    def sweeps(self) -> dict[str, Any]:
        """Returns the generators by name; `seed` is always among them."""
        own = {
            name.removeprefix(PREFIX): value for name, value in vars(self._module).items() if name.startswith(PREFIX)
        }
        return {'seed': sweep_seed, **own}

    @property
    def _module(self) -> ModuleType:
        return _load(self.path)

    def _split(self, overrides: Overrides) -> tuple[str, Overrides]:
        """Returns the argument of the program, and the fields set over it, the point's last."""
        own = [f'{name.removeprefix(":")}={value}' for name, value in overrides.items() if name.startswith(':')]
        fields = {path: value for path, value in overrides.items() if not path.startswith(':')}
        return ','.join(filter(None, [self.argument, *own])), {**self.overrides, **fields}


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: short and stable: it does not depend on what else is swept, and it is the name of the work directory.
      overrides: by field (`model.chunk_size`) or argument (`:context`).
      label: the name without the seed.
      config: resolved; None if it is refused.
      error: why the config refuses the point, or ''.
    """

    name: str
    overrides: Overrides
    label: str
    config: ConfigDict | None
    error: str = ''


def find_points(program: Program, expression: str) -> list[Point]:
    """Returns the points of `--sweep=expression`, in order.

    A comma takes the product of what stands around it, `+` the union, and binds closer: `chunk_size+window,seed:5`.
    `seed:5` calls the generator with 5; a field of the config is a sweep over the values behind it, and so is an
    argument of the program behind its colon: `optimizer.learning_rate:1e-3:3e-3`, `:model:flash:flash_quad`.

    Raises:
      UserError: an unknown sweep, a generator that yields something else or nothing, a field that is set twice, a point
        given twice under one name or two.
    """
    factors = [
        [point for term in factor.split('+') for point in _generate(program, term.strip(), expression)]
        for factor in expression.split(',')
    ]
    points, seen = [], {}
    for parts in itertools.product(*factors):
        overrides: Overrides = {}
        for _, own in parts:
            twice = sorted((own.keys() & overrides.keys()) | (own.keys() & program.overrides.keys()))
            if twice:
                raise UserError(f'--sweep={expression}: {twice[0]} is set twice, by two sweeps or by the command line')
            overrides |= own
        name = _shorten('-'.join(name for name, _ in parts))
        if not name:
            raise UserError(f'--sweep={expression}: the name of a point has no letter or number')
        if name in seen:
            how = 'is given twice' if seen[name] == overrides else f'names two points, {seen[name]} and {overrides}'
            raise UserError(f'--sweep={expression}: point {name} {how}')
        seen[name] = overrides
        label = '-'.join(name for name, own in parts if own.keys() != {'seed'})
        points.append(_resolve(program, name, overrides, label or 'base'))
    if not points:
        raise UserError(f'--sweep={expression} has no point')
    _check_distinct(points, expression)
    return points


def changes(point: Point, base: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns what the point changes against a flat config, and what changes with it, as `field: old -> new`.

    A field that is None, mostly because the model has none of its kind, is `unset`: some have a value `none`.

    Args:
      point: not a refused one.
      base: by dotted field, as `training_config.flatten` gives it.
    """
    own, followed = [], []
    for path, value in training_config.flatten(point.config.to_dict()).items():
        old = base.get(path, 'absent')
        if old != value:
            was, is_now = ('unset' if each is None else each for each in (old, value))
            (own if path in point.overrides else followed).append(f'{path}: {was} -> {is_now}')
    return own, followed


def _resolve(program: Program, name: str, overrides: Overrides, label: str) -> Point:
    try:
        return Point(name, overrides, label, program.config(overrides))
    except UserError as error:
        return Point(name, overrides, label, None, str(error))


def _check_distinct(points: Sequence[Point], expression: str) -> None:
    seen: dict[str, str] = {}
    for point in points:
        if point.config is None:
            continue
        text = point.config.to_json(sort_keys=True)
        if text in seen:
            raise UserError(
                f'--sweep={expression}: points {seen[text]} and {point.name} are one and the same run: leave one out'
            )
        seen[text] = point.name


def _generate(program: Program, term: str, expression: str) -> Iterator[tuple[str, Overrides]]:
    """Yields name and overrides of the points of one sweep."""
    colon, name, values = re.fullmatch('(:?)([^:]*)(.*)', term).groups()
    arguments = [literal(value) for value in values.split(':')[1:]]
    sweeps = program.sweeps()
    if colon or name not in sweeps:
        fields = {} if colon else training_config.flatten(program.open_config({}).to_dict())
        if name not in fields and not (colon and name):
            whole = [path for path in fields if path.rpartition('.')[2] == name]
            kind, options = ('field', fields) if '.' in name else ('sweep', whole or sweeps)
            raise UserError(f'--sweep={expression}: {program.path} has no {kind} "{name}"{did_you_mean(name, options)}')
        path = colon + name
        if not arguments:
            raise UserError(f'--sweep={expression}: values of {path} are missing: {path}:VALUE:VALUE')
        yield from ((_name({path: value}), {path: value}) for value in arguments)
        return
    try:
        found = sweeps[name](*arguments)
        if not isinstance(found, Iterable):
            raise UserError(f'--sweep={expression}: "{name}" of {program.path} returns {found!r} and yields nothing')
        found = list(found)
    except (TypeError, ValueError) as error:
        if not arguments:
            raise
        raise UserError(
            f'--sweep={expression}: {term} is not what "{name}" of {program.path} takes: {error}'
        ) from error
    for overrides in found:
        if not isinstance(overrides, dict):
            raise UserError(f'--sweep={expression}: "{name}" of {program.path} yields {overrides!r}, not a dict')
        given = overrides.get('name')
        overrides = {path: value for path, value in overrides.items() if path != 'name'}
        open_field = next((path for path, value in overrides.items() if value is None), None)
        if open_field is not None:
            raise UserError(f'--sweep={expression}: "{name}" sets {open_field}=None; leave out what the config decides')
        yield _clean(given) if given else _name(overrides), overrides


def _name(overrides: Overrides) -> str:
    """Returns `chunk_size_64-seed_0`: the last part of each field, and of `model.name` the first."""
    if not overrides:
        return 'base'
    parts = []
    for path, value in overrides.items():
        section, _, field = path.lstrip(':').rpartition('.')
        # A round number reads the same whether it was given as a float or not.
        text = repr(value).removesuffix('.0') if isinstance(value, float) else value
        parts.append(_clean(f'{section if field == "name" else field}_{text}'))
    return '-'.join(parts)


def _clean(text: str) -> str:
    return re.sub(r'[^\w.+]+', '_', str(text)).strip('_.')


def _shorten(name: str) -> str:
    if len(name) <= MAX_NAME:
        return name
    return f'{name[: MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}'


def literal(text: str) -> Any:
    """Returns what a value on a command line means: a number, a tuple, ..., or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


_modules: dict[str, ModuleType] = {}


def _load(path: str) -> ModuleType:
    """Returns the program as a module, loaded once.

    Raises:
      UserError: there is no such file.
    """
    if path not in _modules:
        if not Path(path).is_file():
            raise UserError(f'--config={path}: there is no such file')
        spec = importlib.util.spec_from_file_location(f'_config_program_{len(_modules)}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _modules[path] = module
    return _modules[path]


def _get_config(module: ModuleType, argument: str) -> ConfigDict:
    return module.get_config(argument) if argument else module.get_config()


def _set(config: ConfigDict, path: str, value: Any) -> None:
    *parents, field = path.split('.')
    section = config
    for name in parents:
        section = section.get(name) if isinstance(section, ConfigDict) and name in section else None
        if not isinstance(section, ConfigDict):
            raise UserError(f'{path}: unknown config section "{name}"{did_you_mean(name, config)}')
    if field not in section:
        raise UserError(f'{path}: unknown config field "{field}"{did_you_mean(field, section)}')
    try:
        section[field] = value
    except (TypeError, ValueError) as error:
        raise UserError(f'{path}={value!r}: {error}') from error
