"""How programs end: one line and the documented exit code."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from stackwise_jax.errors import EXIT_STOPPED, EXIT_USER_ERROR, StoppedError, UserError, one_line_errors

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("wrong"), EXIT_USER_ERROR, "error: wrong\n"),
        (
            OSError(28, "No space left on device", "x"),
            EXIT_USER_ERROR,
            "error: [Errno 28] No space left on device: 'x'",
        ),
        (StoppedError("stopped by SIGTERM"), EXIT_STOPPED, "stopped by SIGTERM\n"),
        (KeyboardInterrupt(), 130, "\nstopped; a run continues"),
    ],
)
def test_a_line_and_a_code(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(said)


def test_out_of_memory_anywhere_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        jnp.zeros(1 << 45).block_until_ready()
    assert caught.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: out of memory: RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("fault", [RuntimeError("ours"), AssertionError("ours")])
def test_a_fault_of_ours_is_a_traceback(fault: Exception) -> None:
    with pytest.raises(type(fault), match="ours"), one_line_errors():
        raise fault


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False
    )


def test_a_missing_backend_is_a_line() -> None:
    program = "import jax\nfrom stackwise_jax.errors import *\nwith one_line_errors():\n    jax.numpy.zeros(1)"
    for name in ("cuda", "bogus"):
        done = run("-c", program, JAX_PLATFORMS=name)
        assert done.returncode == EXIT_USER_ERROR
        assert done.stderr.startswith(f"error: JAX_PLATFORMS='{name}': ")
        assert "unset it" in done.stderr


def test_a_missing_flagfile_is_a_line() -> None:
    done = run("-m", "stackwise_jax.main", "--config=configs/quickstart.py", "--flagfile=missing")
    assert (done.returncode, done.stderr.count("\n")) == (EXIT_USER_ERROR, 1)
    assert "--flagfile: Unable to open flagfile" in done.stderr


SIGNALLED = """
import os, signal
from stackwise_jax.train.signals import StopSignals
with StopSignals() as _:
    for number in {numbers}:
        os.kill(os.getpid(), number)
print("still here")
"""


def test_the_second_signal_leaves_at_once() -> None:
    once, twice = (run("-c", SIGNALLED.format(numbers=numbers)) for numbers in ([15], [15, 10]))
    assert (once.returncode, once.stdout) == (0, "still here\n")
    assert "SIGTERM: saving, then leaving" in once.stderr
    assert (twice.returncode, twice.stdout) == (128 + 10, "")
    assert "left at once at a second signal, SIGUSR1" in twice.stderr
