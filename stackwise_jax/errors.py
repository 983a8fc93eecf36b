"""Errors for people: one line that names the field, the value and the remedy.

Everything that a user can get wrong raises `UserError`; every program runs its body inside `one_line_errors`, which
prints the message and exits with 2. A traceback therefore always means a fault of ours.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved; run the same command again
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT


class UserError(ValueError):
    """Something the user can repair: a config value, a missing file, a run folder of another config."""


class StoppedError(Exception):
    """A run that a signal stopped after it saved; the message says where it stands."""


def warn(text: str) -> None:
    """Prints one line on stderr that stays."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the closest known word, or '' when nothing is close.

    >>> did_you_mean('d_modle', ['d_model', 'n_heads'])
    ' Did you mean "d_model"?'
    >>> did_you_mean('zzz', ['d_model'])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what a user or the machine got wrong into one line on stderr and an exit code.

    2: a `UserError`, a failing disk, a device without memory or without a driver. 75: a run that a signal stopped.
    130: Ctrl-C where no run is under way.
    """
    try:
        yield
    except UserError as error:
        _leave(f"error: {error}", EXIT_USER_ERROR)
    except StoppedError as stopped:
        _leave(str(stopped), EXIT_STOPPED)
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_USER_ERROR) from None
    except OSError as error:  # a full disk, a vanished mount, a missing permission
        _leave(f"error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _leave("\nstopped; a run continues from its newest snapshot with the same command", EXIT_INTERRUPTED)
    except (RuntimeError, AssertionError) as error:
        explained = _explain_device(error)
        if explained is None:
            raise
        _leave(f"error: {explained}", EXIT_USER_ERROR)


def _leave(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether JAX says that a device, or the host, has no memory left."""
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _explain_device(error: Exception) -> str | None:
    """One line for what JAX says about a device; None for anything else."""
    if is_out_of_memory(error):
        return f"out of memory: {_first_line(error)}; lower training.batch_size or data.seq_len"
    if "jax" not in sys.modules or _has_device():
        return None
    wanted = os.environ.get("JAX_PLATFORMS", "")
    remedy = "unset it" if wanted else "set JAX_PLATFORMS=cpu"
    return (
        f"JAX_PLATFORMS={wanted!r}: {_first_line(error) or 'no such device is usable here'}; {remedy}, or install the "
        "extra of your accelerator (cuda13, cuda12, tpu) and check its driver"
    )


def _has_device() -> bool:
    try:
        return bool(sys.modules["jax"].devices())
    except (RuntimeError, AssertionError):  # an AssertionError without a word where a plug-in is not installed
        return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:240]
