"""Config fields as text, `--set=training.remat=dots`, for programs that build their config themselves."""

from collections.abc import Iterable
from typing import Any

from stackwise_jax.errors import UserError, did_you_mean


def apply_overrides(entries: Any, overrides: Iterable[str]) -> None:
    """Sets fields of the `ConfigDict` that `config.default()` returned.

    Args:
      entries: changed in place; not yet resolved.
      overrides: each "section.field=value"; None is a value where a field may have none.

    Raises:
      UserError: no such field, or a value that is not of the field's type.
    """
    for text in overrides:
        field, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set={text} must read section.field=value, for example --set=training.remat=dots")
        *sections, name = field.strip().split(".")
        section = entries
        for part in [*sections, name]:
            if not hasattr(section, "get_type") or part not in section:
                known = section.keys() if hasattr(section, "get_type") else ()
                raise UserError(f"--set={text}: unknown config field {field}.{did_you_mean(part, known)}")
            section = section if part == name else section[part]
        kind = section.get_type(name)
        try:
            section[name] = _parse(kind, value.strip())
        except (TypeError, ValueError):
            raise UserError(f"--set={text}: {field} must be of type {kind.__name__}, not {value!r}") from None


def _parse(kind: type, text: str) -> Any:
    if text == "None":
        return None
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return kind(text) if kind in (int, float, str) else text
