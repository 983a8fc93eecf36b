"""From a person's config to the one that code reads: `default()` to edit, `resolve()` to check, JSON to store.

A person edits the locked `ConfigDict` that `default()` returns (in `configs/*.py` or by
`--config.model.d_model=512`); the code reads the frozen `RunConfig` of `schema.py` that `resolve()` builds from it.
`resolve()` is the only way to a `RunConfig`; what it refuses stands in `checks/`. Nothing heavy is imported, so that
`--help` and a config error answer at once.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackwise_jax.checks import settle
from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.schema import FusionConfig, GrowthConfig, ObjectiveConfig, ProgressiveConfig, RunConfig

# Sections and fields that may differ when a run folder is continued: they change no number that a run computes, or by
# rounding alone (a prepared corpus is checked by its digest, wherever it lies).
FREE_FIELDS = ("checkpoint", "logging", "generation", "mesh", "data.prepared", "data.cache_dir", "data.tfds_dir")
FREE_FIELDS += ("cache.tier", "cache.folder", "cache.on_mismatch")


def default() -> Any:
    """Returns the locked `ConfigDict` of every default, for a config file to edit."""
    from ml_collections import config_dict

    def as_dict(cls: type) -> Any:
        entries = {}
        for name, kind in typing.get_type_hints(cls).items():
            value = getattr(cls(), name)
            if dataclasses.is_dataclass(kind):
                entries[name] = as_dict(typing.cast(type, kind))
            elif value is None or isinstance(kind, types.UnionType):
                typed = config_dict.placeholder(_plain_type(kind))
                typed.set(value)
                entries[name] = typed
            else:
                entries[name] = value
        return config_dict.ConfigDict(entries)

    return as_dict(RunConfig).lock()


def _plain_type(kind: Any) -> type:
    """The T of `T` or `T | None`."""
    if isinstance(kind, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def resolve(config: Any) -> RunConfig:
    """Builds and checks the `RunConfig` that code reads.

    Args:
      config: a `ConfigDict` from `default()`, or a nested mapping as stored in `config.json`; absent keys take
        defaults.

    Returns:
      the config with every derived `None` filled in and `training.mode` settled.

    Raises:
      UserError: an unknown key, a wrong type, or values that do not fit together; one line.
    """
    entries = config.to_dict() if hasattr(config, "to_dict") else config
    return settle(_build(RunConfig, entries, ""))


def _build(cls: type, entries: Any, prefix: str) -> Any:
    if not isinstance(entries, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'config'}={entries!r} must be a section with fields")
    kinds = typing.get_type_hints(cls)
    values = {}
    for name, value in entries.items():
        if name not in kinds:
            raise UserError(f"unknown config field {prefix}{name}.{did_you_mean(str(name), kinds)}")
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(typing.cast(type, kind), value, f"{prefix}{name}.")
        else:
            values[name] = _checked(kind, value, f"{prefix}{name}")
    return cls(**values)


def _checked(kind: Any, value: Any, field: str) -> Any:
    if value is None and isinstance(kind, types.UnionType):
        return None
    plain = _plain_type(kind)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not plain:
        raise UserError(f"{field}={value!r} must be of type {plain.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field}={value} must be a finite number")
    return value


def without_growth(config: RunConfig) -> RunConfig:
    """The config of a run whose stacks are trained together: no direction, no bands, an untied head that is its own."""
    training, model, none = config.training, config.model, ObjectiveConfig()
    objective = dataclasses.replace(
        config.objective,
        time={"depth": "none", "depth_input": "input"}.get(config.objective.time, config.objective.time),
        n_bands=none.n_bands,
        levels=none.levels,
        consistency=none.consistency,
    )
    if training.head == "copy":
        model = dataclasses.replace(model, ties_embedding=False)
    precision = training.progressive.new_stack_precision
    progressive = dataclasses.replace(ProgressiveConfig(), new_stack_precision=precision)
    training = dataclasses.replace(
        training, head="live", progressive=progressive, growth=GrowthConfig(), fusion=FusionConfig()
    )
    return dataclasses.replace(config, model=model, objective=objective, training=training)


def to_json(config: RunConfig) -> str:
    """The resolved config as it is stored in a run folder."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(path: Path) -> RunConfig:
    """Reads the `config.json` of a run folder; never executes anything."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run folder: {path.name} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as a config: {error}") from None
    return resolve(entries)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Names the fields, with both values, that forbid continuing a run of `old` as `new`."""

    def flatten(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in entries.items():
            flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        return flat

    def is_free(field: str) -> bool:
        return any(field == free or field.startswith(f"{free}.") for free in FREE_FIELDS)

    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    return [
        f"{field}={before[field]!r} (now {after[field]!r})"
        for field in before
        if before[field] != after[field] and not is_free(field)
    ]
