"""Which interpreter has PyTorch and `transformers`."""

import importlib.util
import os
import sys

import pytest


def reference_python() -> str:
    """This interpreter, or the one that $STACKWISE_REFERENCE_PYTHON names; skips the test where neither will do."""
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        return sys.executable
    named = os.environ.get("STACKWISE_REFERENCE_PYTHON", "")
    if not named:
        pytest.skip("needs torch and transformers, here or in the interpreter that $STACKWISE_REFERENCE_PYTHON names")
    return named
