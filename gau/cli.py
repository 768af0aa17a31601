"""How every entry point starts: flags and config parsed, user errors as one line and exit code 2."""

import errno
import functools
import io
import math
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from gau import flag_values, outputs
from gau.errors import RunFailed, UserError, chain, did_you_mean, is_no_space
from gau.models import fields
from gau.training import config as training_config
from gau.training import durations, workdir


def define_config(required: bool = True) -> None:
    """Defines `--config=FILE[:name=value,...]` and, through it, `--config.field=value` for every field."""
    flag_values.register()
    config_flags.DEFINE_config_file('config', None, 'Config program: FILE[:name=value,...]', lock_config=True)
    if required:
        flags.mark_flag_as_required('config')


def load_config() -> ConfigDict:
    """Returns the config with the command line's overrides, resolved and checked before anything heavy is imported.

    A duration stands in one unit only, so a unit given on the command line replaces the config's own:
    `--config.tokens=1000000` takes the place of the file's `steps`.

    Raises:
      UserError: an unknown name, a wrong combination or a number out of range.
    """
    given = set(overrides())
    durations.keep_given_units(flags.FLAGS.config, given)
    return training_config.resolve(flags.FLAGS.config, given=given)


def overrides() -> dict[str, Any]:
    """Returns the values of the `--config.field=value` on the command line, by the field's path."""
    return dict(config_flags.get_override_values(flags.FLAGS['config']))


def define_processes() -> None:
    """Defines the flags that join the processes of one run, see `gau.training.distributed.processes`."""
    flags.DEFINE_enum(
        'distributed',
        'auto',
        ['auto', 'off'],
        'auto: join the processes that Slurm, Open MPI, Kubernetes or Cloud TPU started together, if there are any, or '
        'those of the three flags below; off: this process alone, whatever the environment says.',
    )
    flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0, where the processes meet.')
    flags.DEFINE_integer('num_processes', None, 'How many processes the run has.')
    flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
    flags.DEFINE_integer(
        'heartbeat_seconds', 100, 'A process that has been silent for so long is dead, and all the others end.'
    )


def processes() -> AbstractContextManager[None]:
    """Returns the context in which the processes of the run are joined, by the flags of `define_processes`.

    Raises:
      UserError: the flags do not fit together, or, on entering, the processes did not find each other.
    """
    # Imported late: this imports JAX.
    from gau.training import distributed

    values = flags.FLAGS
    if values.distributed == 'off':
        refuse('heartbeat_seconds', beside='distributed=off', because='one process waits for no other')
    return distributed.processes(
        coordinator_address=values.coordinator_address,
        num_processes=values.num_processes,
        process_id=values.process_id,
        detect=values.distributed == 'auto',
        heartbeat_seconds=values.heartbeat_seconds,
    )


def run(main: Callable[..., int | None], *, arguments: bool = False, stored_config: bool = False) -> None:
    """Parses the flags and runs `main()`; exits with its return value, or with 2 after one line for a UserError.

    Args:
      main: returns the exit code; None is 0.
      arguments: whether it takes what is no flag, as a list; else that is bad usage.
      stored_config: whether `--config.field=value` changes the config of the run in `--workdir`; main finds it in
        `flags.FLAGS.config`.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            if arguments:
                return main(list(argv[1:]))
            if len(argv) > 1:
                raise UserError(f'unexpected argument "{argv[1]}": flags are written --name=value')
            return main()
        except UserError as error:
            return _complain(error)
        except RunFailed as error:
            return _complain(error, code=1)
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            return 130
        except BrokenPipeError:
            # Whoever reads the output has seen enough, as `| head` has. Nothing more is to be written at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            fault = _fault_of_machine(error)
            if fault is None:
                raise
            return _complain(fault, code=1)

    # Our own words go to stdout and stderr; Orbax and Grain warn of what is normal here, and Orbax logs what it raises,
    # with a traceback for each of its threads.
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _unraisable
    # Where a write of Orbax has failed, others were not begun. At exit this would come behind the line that says why.
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    for stream in (sys.stdout, sys.stderr):
        # A terminal or a file that is not UTF-8 gets escapes for what it cannot show.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    app.run(guarded, flags_parser=functools.partial(_parse_flags, stored_config=stored_config))


def _unraisable(unraisable: Any) -> None:
    """In place of sys.unraisablehook, which tells what Python drops: what callbacks and objects that go away raise."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Ctrl-C came in the middle of a callback, as JAX has one of the garbage collector: once more, for the program.
        again = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()
        return
    # Where a write of Orbax has failed, the others come back when nobody waits.
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == 'Event loop is closed'):
        sys.__unraisablehook__(unraisable)


def _parse_flags(argv: Sequence[str], *, stored_config: bool) -> list[str]:
    stored = None
    try:
        _check_given_once(argv)
        if stored_config:
            stored = _stored_config(argv)
            flag_values.register()
            config_flags.DEFINE_config_dict('config', stored, 'Changes of the config of the run.', lock_config=True)
        rest = flags.FLAGS(argv)
        if 'config' in flags.FLAGS and flags.FLAGS['config'].value is not None:
            # A config file that is not there is reported only when its fields are asked for.
            flags.FLAGS['config'].value.to_dict()
            _check_nones()
        _check_numbers()
        return rest
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(_complain(_explain(error, argv, stored)))


def _check_given_once(argv: Sequence[str]) -> None:
    """Raises UserError if what says which run it is stands there twice.

    Of other flags the last one counts, so that a command can be changed by what is put behind it.
    """
    for name in ('config', 'workdir'):
        if sum(re.match(rf'--?{name}(=|$)', argument) is not None for argument in argv) > 1:
            raise UserError(f'--{name} is given twice: the first would do nothing')


def _check_numbers() -> None:
    """Raises UserError if a number on the command line is none."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present and isinstance(flag.value, float) and math.isnan(flag.value):
            raise UserError(f'--{name}={flag.value} is not a number')


def _check_nones() -> None:
    """Raises UserError if the command line empties a field that must have a value."""
    defaults = training_config.flatten(training_config.default_config().to_dict())
    for path, value in overrides().items():
        if value is None and defaults.get(path) is not None and not durations.is_duration(path):
            raise UserError(f'--config.{path}=None: it must have a value; the default is {defaults[path]}')


def _stored_config(argv: Sequence[str]) -> ConfigDict:
    """Returns the config of the run in `--workdir`, which must be known before its fields can be flags."""
    for argument, following in zip(argv, [*argv[1:], ''], strict=True):
        match = re.fullmatch(r'--?workdir(?:=(.*))?', argument)
        if match:
            directory = Path(following if match[1] is None else match[1])
            config = workdir.with_data_found(directory, workdir.read_config(directory))
            _type_nones(config, training_config.default_config())
            return config
    return ConfigDict()  # Absl says what is missing.


def _type_nones(config: ConfigDict, defaults: ConfigDict) -> None:
    """Gives fields that are None, in place, the types that they have in `defaults`: JSON keeps none for them."""
    for field, value in config.items():
        if field in defaults and isinstance(value, ConfigDict) and isinstance(defaults[field], ConfigDict):
            _type_nones(value, defaults[field])
        elif field in defaults and value is None:
            config[field] = defaults.get_ref(field)


def _explain(error: BaseException, argv: Sequence[str], stored: ConfigDict | None) -> str:
    """One line for whatever flag parsing raised; a UserError raised inside the config program speaks for itself."""
    for cause in chain(error):
        if isinstance(cause, UserError):
            return str(cause)
    fault = _fault_of_config_program(error, argv)
    if fault:
        return fault
    if isinstance(error, AttributeError | KeyError):
        return _explain_unknown_field(argv, stored) or str(error)
    text = str(error).replace('\\n', '\n')
    if isinstance(error, OSError) and 'Failed loading config file' in text:
        name = next((argument for argument in argv if argument.startswith('--config=')), '--config')
        return f'{name}: {text.strip().splitlines()[-1].strip()}'
    if '--config=None' in text:
        return '--config=FILE[:name=value,...] must be given, for example --config=configs/quickstart.py'
    missing = re.findall(r'flag (--\w+)=None: Flag \1 must have a value', text)
    return f'{", ".join(missing)} must be given' if missing else text


def _fault_of_config_program(error: BaseException, argv: Sequence[str]) -> str | None:
    """Says what is wrong with the config program and in which line of it, if anything is."""
    given = next((argument.partition('=')[2] for argument in argv if argument.startswith('--config=')), '')
    name = given.partition(':')[0]
    if not os.path.isfile(name):
        return None
    for cause in chain(error):
        if isinstance(cause, SyntaxError) and cause.filename and os.path.exists(cause.filename):
            return f'{cause.filename}:{cause.lineno}: {cause.msg}'
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if os.path.exists(frame.filename) and os.path.samefile(frame.filename, name):
                return f'{name}:{frame.lineno}: {type(cause).__name__}: {cause}'
        if isinstance(cause, AttributeError) and "no attribute 'get_config'" in str(cause):
            return f'{name}: a config program defines get_config(arg=None), and this one has none'
        if isinstance(cause, TypeError) and 'get_config()' in str(cause):
            # ml_collections puts the whole traceback into the message.
            return f'--config={given}: {str(cause).strip().splitlines()[-1]}'
        if '--config=None' in str(cause) or "'to_dict'" in str(cause):
            found = type(flags.FLAGS['config'].value).__name__
            return f'{name}: get_config() returned {found}, where a ConfigDict is expected'
    return None


def _explain_unknown_field(argv: Sequence[str], stored: ConfigDict | None) -> str | None:
    """Finds the first --config.a.b whose path does not exist and names the nearest that does."""
    file = next((argument.partition('=')[2] for argument in argv if argument.startswith('--config=')), None)
    config = stored if file is None else flags.FLAGS['config'].parser.parse(file)
    if config is None:
        return None
    for argument in argv:
        match = re.match(r'--(?:no)?config\.([\w.]+)', argument)
        section = config
        for field in match[1].split('.') if match else ():
            if not isinstance(section, ConfigDict):
                return f'--config.{match[1]}: unknown config field, "{field}" would lie inside a plain value'
            if field not in section:
                hint = fields.unknown if section is config.get('model') else did_you_mean
                return f'--config.{match[1]}: unknown config field "{field}"{hint(field, section.keys())}'
            section = section[field]
    return None


def _fault_of_machine(error: Exception) -> str | None:
    """Says in one line what the machine lacks, if that is what an exception is about."""
    causes = list(chain(error))
    file = next((f'{cause.filename}: ' for cause in causes if isinstance(cause, OSError) and cause.filename), '')
    if is_no_space(error):
        return f'{file}no space left; what was written before is whole, and the same command goes on when there is room'
    for cause in causes:
        # Of JAX, which must not be imported for its type.
        if type(cause).__name__ == 'JaxRuntimeError' and str(cause).startswith('RESOURCE_EXHAUSTED: '):
            said = str(cause).splitlines()[0].removeprefix('RESOURCE_EXHAUSTED: ').rstrip('.')
            share = os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION')
            given = f' of the share of the device that XLA_PYTHON_CLIENT_MEM_FRACTION={share} gives it' if share else ''
            return (
                f'out of memory{given} ({said}): a smaller batch needs less; in training also '
                'optimizer.accumulation_steps, which divides the batch, and model.remat=full'
            )
        if isinstance(cause, MemoryError):
            return f'out of memory ({cause})' if str(cause) else 'out of memory'
        if isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f'{file}{cause.strerror}'
        # JAX itself fails at an assertion where there is no plugin for a platform that it knows.
        frames = traceback.extract_tb(cause.__traceback__)
        unknown = isinstance(cause, AssertionError) and frames and frames[-1].filename.endswith('xla_bridge.py')
        if unknown or (isinstance(cause, RuntimeError) and 'Unable to initialize backend' in str(cause)):
            named = os.environ.get('JAX_PLATFORMS')
            reason = f' ({str(cause).splitlines()[0]})' if str(cause) else ''
            return (
                f'JAX cannot start the platform of JAX_PLATFORMS={named}{reason}: install JAX for it '
                '(README.md, "Train, evaluate, sample"), or unset JAX_PLATFORMS to take what is there'
            )
    return None


def _complain(error: object, *, code: int = 2) -> int:
    print('error: ' + ' '.join(str(error).split()), file=sys.stderr)
    return code


def output_file(flag: str) -> Path | None:
    """Returns the file that a flag names, whose directory is made if there is none yet; None if it names none.

    To be asked before the work whose result goes there.

    Raises:
      UserError: nothing can be written there.
    """
    value = flags.FLAGS[flag].value
    if not value:
        return None
    outputs.check_file(Path(value), flag=flag)
    return Path(value)


def refuse(*names: str, beside: str, because: str) -> None:
    """Raises UserError if one of these flags was given, which would do nothing beside another, `--beside`."""
    for name in names:
        if flags.FLAGS[name].present:
            raise UserError(f'--{name} does nothing with --{beside}: {because}')


def refuse_without(*names: str, beside: Sequence[str]) -> None:
    """Raises UserError if one of these flags was given and none of those `beside` which alone it does something."""
    if any(flags.FLAGS[name].value for name in beside):
        return
    for name in names:
        if flags.FLAGS[name].present:
            raise UserError(f'--{name} does nothing without {" or ".join(f"--{other}" for other in beside)}')


def parse_positive_integers(flag: str, values: Sequence[str] | None) -> list[int] | None:
    """Returns a list flag's values as positive integers of 32 bits; None stays None.

    Raises:
      UserError: a value that is none, or no value at all.
    """
    if values is None:
        return None
    if not values:
        raise UserError(f'--{flag}= names none: leave it out, or give positive integers')
    for value in values:
        if not value.strip().isdecimal() or not 0 < int(value) < 2**31:
            raise UserError(f'--{flag}={",".join(values)}: "{value}" is not a positive integer below 2**31')
    return [int(value) for value in values]
