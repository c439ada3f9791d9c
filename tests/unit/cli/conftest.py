"""What the tests of the command line share."""

import sys
import types

import pytest


@pytest.fixture
def fake(monkeypatch):
    """Put a function in the place of the one a subcommand calls; its calls are recorded."""

    def install(module: str, name: str, effect=0):
        calls = []

        def function(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(effect, BaseException):
                raise effect
            return effect

        stand_in = types.ModuleType(f"qwen3next_train.{module}")
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, f"qwen3next_train.{module}", stand_in)
        return calls

    return install
