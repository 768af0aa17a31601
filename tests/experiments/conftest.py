"""What tests of commands that start others have in common."""

import subprocess

import pytest


@pytest.fixture
def started(monkeypatch):
    """The arguments of every process that was to be started: none is, and each would end with 0."""
    found = []

    class Process:
        def __init__(self, arguments):
            found.append(arguments)

        def wait(self):
            return 0

    monkeypatch.setattr(subprocess, 'Popen', Process)
    return found
