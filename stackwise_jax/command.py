"""Command lines: flags, --help, and one line for a user's mistake."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from stackwise_jax.errors import UserError, one_line_errors


def run_command(
    program: Callable[[Any], None], options: flags.FlagValues, about: str, argv: list[str] | None = None
) -> None:
    """Parses the command line into `options` and calls `program` with them.

    Args:
      options: the flags of this program alone, made anew for each call; one of them is `workdir`.
      about: what --help says above the flags.
      argv: the program's name, then its arguments; None: those of the process.
    """
    argv = list(sys.argv) if argv is None else argv
    with one_line_errors():
        if {"--help", "-h", "-help"} & set(argv):
            names = sorted(options)
            lines = [f"  --{name:<12} {options[name].help.splitlines()[0].rstrip(';')}" for name in names]
            print("\n".join([about.strip(), "", "Flags:", *lines]), flush=True)
            return
        parse_flags(options, argv)
        program(options)


def parse_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """Parses a command line; UserError for an unknown flag, a value that does not fit, or anything that is no flag."""
    try:
        rest = values(argv)
    except flags.Error as error:
        reason = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        raise UserError(reason.removeprefix("FATAL Flags parsing error: ")) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; every option is a flag, --name=value")


def required_workdir(options: Any) -> Path:
    """The run folder that was asked for; UserError without one."""
    if not options.workdir:
        raise UserError("--workdir is missing; give the folder of a run, for example --workdir=runs/quickstart")
    return Path(options.workdir).expanduser()
