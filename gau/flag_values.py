"""How values of config fields may be written on a command line, beyond what absl reads.

Whole numbers as `1e6` or `1_000_000`, truth as `yes`, `no`, `on` or `off`, and `None` for a field that may be empty.
"""

import decimal
from typing import Any

from absl import flags
from ml_collections import config_flags

_NONE = 'None'
_TRUTH = {'yes': True, 'on': True, 'no': False, 'off': False}


def register() -> None:
    """Has the flags of config fields read by the parsers below, by the type that a field has."""
    for kind, parser in ((int, _Integer()), (float, _Float()), (bool, _Boolean()), (str, _String())):
        config_flags.register_flag_parser_for_type(kind, parser)


class _Integer(flags.IntegerParser):
    def parse(self, argument: Any) -> int | None:
        return None if argument == _NONE else super().parse(argument)

    def convert(self, argument: Any) -> int:
        try:
            return super().convert(argument)
        except ValueError:
            try:
                number = decimal.Decimal(argument)
            except decimal.InvalidOperation:
                raise ValueError(f'"{argument}" is not a number') from None
            # Nothing in a config is larger, and 1e999999999 would take all memory.
            if not number.is_finite() or number.adjusted() > 18 or number != number.to_integral_value():
                raise ValueError(f'"{argument}" is not a whole number below 10**19') from None
            return int(number)


class _Float(flags.FloatParser):
    def parse(self, argument: Any) -> float | None:
        return None if argument == _NONE else super().parse(argument)


class _Boolean(flags.BooleanParser):
    def parse(self, argument: Any) -> bool | None:
        if argument == _NONE:
            return None
        truth = _TRUTH.get(argument.lower()) if isinstance(argument, str) else None
        return super().parse(argument) if truth is None else truth


class _String(flags.ArgumentParser):
    def parse(self, argument: str) -> str | None:
        return None if argument == _NONE else super().parse(argument)
