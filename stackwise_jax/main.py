"""`python -m stackwise_jax.main --config=configs/quickstart.py`: trains a run, or continues it."""

import dataclasses
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from stackwise_jax import config as config_lib
from stackwise_jax import schema
from stackwise_jax.command import parse_flags
from stackwise_jax.errors import UserError, did_you_mean, one_line_errors
from stackwise_jax.schema import RunConfig

FLAGS = flags.FLAGS
with one_line_errors():
    try:  # it opens every --flagfile at once
        about = "A config file, FILE.py or FILE.py:ARGUMENT."
        config_flags.DEFINE_config_file("config", None, about, lock_config=True)
    except flags.Error as error:
        raise UserError(f"--flagfile: {error}".replace("ERROR:: ", "")) from None
flags.DEFINE_string("workdir", None, "The run folder; continued when it exists. Default: runs/NAME of the config.")
flags.DEFINE_bool("plan", False, "Print what the run will do and cost, then stop.")
flags.DEFINE_string(
    "card", None, "With --plan: plan for this card (H200, H100, A100, L4, 4090 ..), not the device at hand."
)
flags.DEFINE_float("device_gib", None, "With --plan: memory of a card of another size.", lower_bound=0.1)
flags.DEFINE_float(
    "host_gib", None, "With --plan: host memory that the run may take, not what is free here.", lower_bound=0.1
)
flags.DEFINE_float("disk_gib", None, "With --plan: disk that the run may take, not what is free here.", lower_bound=0.1)
flags.DEFINE_float(
    "mfu", None, "With --plan: share of the peak FLOP/s that a run reaches. Default: 0.5, a guess.", lower_bound=0.001
)
flags.DEFINE_bool("print_config", False, "Print the resolved config as JSON, then stop.")


def main(config: RunConfig) -> None:
    """Prints the config or the plan when asked to, and trains otherwise."""
    if FLAGS.print_config:
        print(config_lib.to_json(config))
        return
    if FLAGS.plan:
        print_plan(config)
        return
    from stackwise_jax.memory.placement import start_backend
    from stackwise_jax.report import train_and_report

    start_backend()
    train_and_report(config, run_folder(config))


def run_folder(config: RunConfig) -> Path:
    """Where the run of the command line lies."""
    return Path(FLAGS.workdir or Path("runs") / config.name).expanduser()


def print_plan(config: RunConfig) -> None:
    """Prints what a run does and costs, for the machine at hand or the one that flags describe."""
    from stackwise_jax.train.describe import describe
    from stackwise_jax.train.machine import machine
    from stackwise_jax.train.plan import make_plan

    sizes = {name: FLAGS[name].value for name in ("card", "device_gib", "host_gib", "disk_gib")}
    target = machine(run_folder(config), **sizes, share=FLAGS.mfu, peak=config.logging.peak_flops)
    print(describe(make_plan(config, None), target))


def run_program(program: Callable[[RunConfig], None], argv: list[str] | None = None) -> None:
    """Runs a program on the config of the command line; a user's mistake becomes one line and exit code 2."""
    argv = list(sys.argv) if argv is None else argv
    with one_line_errors():
        if {"--help", "-h", "-help"} & set(argv):
            print(help_text(inspect.getmodule(program)), flush=True)
            return
        program(load_config(argv))


def load_config(argv: list[str]) -> RunConfig:
    """Parses `--config=FILE.py:ARGUMENT --config.field=value ...` and the other flags.

    Raises:
      UserError: no config, a missing or failing file, an unknown flag or field, a wrong type.
    """
    path = _config_path(argv)
    argv, unset = _take_unset(argv)
    try:
        parse_flags(FLAGS, argv)
    except UserError:
        raise
    except Exception as error:  # a config file is code and may raise anything
        raise UserError(_explain(path, error)) from None
    if FLAGS.config is None:
        raise UserError(f"{path}: get_config() returned None; end it with `return config`")
    entries = FLAGS.config.to_dict()
    for field in unset:
        section: Any = entries
        *sections, name = field.split(".")
        for part in sections:
            section = section[part] if isinstance(section, dict) and part in section else {}
        if name not in section:
            raise UserError(f"unknown config field {field}.{did_you_mean(name, section)}")
        section[name] = None
    return config_lib.resolve(entries)


def _take_unset(argv: list[str]) -> tuple[list[str], list[str]]:
    """Takes out `--config.field=None`, which typed flags cannot parse; returns the rest and those fields."""
    matches = [re.fullmatch(r"--?config\.([\w.]+)=None", argument) for argument in argv]
    kept = [argument for argument, match in zip(argv, matches, strict=True) if match is None]
    return kept, [match[1] for match in matches if match]


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
    text = str(error).partition("Other fields present")[0].replace("\\n", " ").replace("\\'", "'")
    text = " ".join(text.split()).strip("\"' ") or type(error).__name__
    if "has no attribute 'get_config" in text:
        text = "it must define get_config(), which returns the config"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    if not frames and isinstance(error, AttributeError | KeyError) and "get_config" not in text:
        return f"unknown config field: {text.replace(chr(39), '')}"
    return f"{path}:{frames[-1].lineno}: {text}" if frames else f"{path}: {text}"


def help_text(module: Any) -> str:
    """The program's own sentence, its flags, and every config field with its default and meaning."""
    lines = [(inspect.getdoc(module) or "").splitlines()[0], "", "Flags:"]
    own = [flag.name for flag in FLAGS.get_flags_for_module(module)]
    names = dict.fromkeys(["config", "workdir", "plan", "print_config", *own])
    lines += [f"  --{name:<13} {FLAGS[name].help}" for name in names]
    lines += ["", "Config fields (--config.model.d_model=512):", *_fields_help(schema.RunConfig, "")]
    return "\n".join(lines)


def _fields_help(section: Any, prefix: str) -> list[str]:
    """A line a field, read from the source of `schema.py`; inner sections come last, under their own names."""
    fields = re.compile(r"    (\w+): [^=]+ = (.+?)(?:  # (.*))?$")
    inner = {name: kind for name, kind in typing.get_type_hints(section).items() if dataclasses.is_dataclass(kind)}
    lines = ["", f"  {prefix.rstrip('.')}: {(section.__doc__ or '').strip().splitlines()[0]}"] if prefix else []
    matches = filter(None, map(fields.match, inspect.getsource(section).splitlines()))
    own = [match for match in matches if match[1] not in inner]
    lines += [f"    {prefix + match[1]:<44} {match[2]:<14} {match[3] or ''}".rstrip() for match in own]
    return lines + [line for name, kind in inner.items() for line in _fields_help(kind, f"{prefix}{name}.")]


if __name__ == "__main__":
    run_program(main)
