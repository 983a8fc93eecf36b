"""Errors for people: one line that names the field, the value and the remedy.

Everything that a user can get wrong raises `UserError`; every program runs its body inside `one_line_errors`, which
prints the message and exits with 2. A traceback therefore always means a fault of ours.
"""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT


class UserError(ValueError):
    """Something the user can repair: a config value, a missing file, a run folder of another config."""


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
    """Turns a `UserError` or a failing disk into one line on stderr and exit code 2, and Ctrl-C into one and 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_USER_ERROR) from None
    except OSError as error:  # a full disk, a vanished mount, a missing permission
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        print("\nstopped; a run continues from its newest snapshot with the same command", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
