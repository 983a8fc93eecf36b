"""`python -m stackwise_jax.main --config=configs/quickstart.py`: flags, then config, then run. Short on purpose."""

import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from stackwise_jax import config as config_lib
from stackwise_jax import schema
from stackwise_jax.errors import UserError, did_you_mean, one_line_errors
from stackwise_jax.schema import RunConfig

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "A config file, FILE.py or FILE.py:ARGUMENT.", lock_config=True)
flags.DEFINE_string("workdir", None, "The run folder; continued when it exists. Default: runs/NAME of the config.")
flags.DEFINE_bool("plan", False, "Print what the run will do and cost, then stop.")
flags.DEFINE_bool("print_config", False, "Print the resolved config as JSON, then stop.")


def main(config: RunConfig) -> None:
    """Prints the config or the plan when asked to, and trains otherwise."""
    if FLAGS.print_config:
        print(config_lib.to_json(config))
        return
    if FLAGS.plan:
        from stackwise_jax.train.plan import describe, make_plan

        print(describe(make_plan(config, None)))
        return
    from stackwise_jax.report import train_and_report

    train_and_report(config, Path(FLAGS.workdir or Path("runs") / config.name))


def run_program(program: Callable[[RunConfig], None], argv: list[str] | None = None) -> None:
    """Runs a program on the config of the command line; a user's mistake becomes one line and exit code 2."""
    argv = list(sys.argv) if argv is None else argv
    if {"--help", "-h", "-help"} & set(argv):
        print(help_text(inspect.getmodule(program)))
        return
    with one_line_errors():
        program(load_config(argv))


def load_config(argv: list[str]) -> RunConfig:
    """Parses `--config=FILE.py:ARGUMENT --config.field=value ...` and the other flags.

    Raises:
      UserError: no config, a missing or failing file, an unknown flag or field, a wrong type.
    """
    path = _config_path(argv)
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        reason = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        raise UserError(reason.removeprefix("FATAL Flags parsing error: ")) from None
    except Exception as error:  # a config file is code and may raise anything
        raise UserError(_explain(path, error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; every option is a flag, --name=value")
    return config_lib.resolve(FLAGS.config)


def _config_path(argv: list[str]) -> Path:
    for index, argument in enumerate(argv):
        if re.fullmatch(r"--?config(=.*)?", argument):
            value = argument.partition("=")[2] or "".join(argv[index + 1 : index + 2])
            path = Path(value.partition(":")[0])
            if path.is_file():
                return path
            near = [str(file) for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
            raise UserError(f"--config={value}: no such file.{did_you_mean(str(path), near)}")
    raise UserError("--config is missing; for example --config=configs/quickstart.py")


def _explain(path: Path, error: Exception) -> str:
    """One line for an exception out of a config file or an override: where, what, and the library's own hint."""
    text = " ".join(str(error).strip("\"'").replace("\\n", " ").split()).strip("\"' ") or type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    where = f"{path}:{frames[-1].lineno}" if frames else "--config"
    return f"{where}: {text}"


def help_text(module: object) -> str:
    """The program's own sentence, its flags, and every config field with its default and meaning."""
    lines = [inspect.getdoc(module) or "", "", "Flags:"]
    lines += [f"  --{name:<13} {FLAGS[name].help}" for name in ("config", "workdir", "plan", "print_config")]
    lines += ["", "Config fields (--config.model.d_model=512):"]
    fields = re.compile(r"    (\w+): [^=]+ = (.+?)(?:  # (.*))?$")
    for section, kind in schema.RunConfig.__annotations__.items():
        if not inspect.isclass(kind) or kind.__module__ != schema.__name__:
            continue
        lines += ["", f"  {section}: {(kind.__doc__ or '').strip().splitlines()[0]}"]
        for line in inspect.getsource(kind).splitlines():
            if match := fields.match(line):
                lines.append(f"    {match[1]:<28} {match[2]:<14} {match[3] or ''}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main)
