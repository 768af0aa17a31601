"""Programs that tests run: in a process of their own, or in this one where only their words are looked at."""

import contextlib
import io
import json
import logging
import os
import runpy
import subprocess
import sys
from typing import Any
from unittest import mock

from absl import app, flags
from absl import logging as absl_logging

from tests.conftest import ROOT


def report(module: str, *arguments: Any) -> Any:
    """Runs `python -m MODULE ARGUMENTS` from the root; returns what it printed last, an object in JSON.

    A process of its own is for what is fixed when JAX starts, such as the number of devices.
    """
    # What this process imports from elsewhere (libtpu, say) is found there, too.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(
        [sys.executable, '-m', module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        # A guard against hanging, whatever else the machine does.
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def call(script: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a script of the project in this process, from the root; returns its exit code, stdout and stderr.

    For what is said before anything is computed: to start Python and import JAX again costs more than all else.
    """
    app.define_help_flags()
    before, verbosity, handlers = set(flags.FLAGS), absl_logging.get_verbosity(), logging.root.handlers[:]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(ROOT))
        stack.enter_context(mock.patch.object(sys, 'argv', [script, *arguments]))
        stack.enter_context(mock.patch.object(sys, 'path', [str((ROOT / script).parent), *sys.path]))
        stack.enter_context(mock.patch.object(sys, 'unraisablehook', sys.unraisablehook))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as done:
            code = done.code or 0
        finally:
            # Flags are absl's for the whole process. Those of a library that was imported meanwhile stay; config fields
            # on the command line are flags that count as defined in absl itself.
            own = {script, 'gau.cli', 'absl.flags._flag'}
            for name in set(flags.FLAGS) - before:
                if flags.FLAGS.find_module_defining_flag(name) in own:
                    delattr(flags.FLAGS, name)
            absl_logging.set_verbosity(verbosity)
            logging.root.handlers[:] = handlers
    return code, out.getvalue(), err.getvalue()
