"""A configuration that a run directory or an export keeps: what its keys mean, also those that it lacks.

A key that a stored configuration lacks was added to the program later; it means the behaviour from before the key
existed. Where that is not the key's default, the key says so in `trainer.config` (`before`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import Config, section_of
from trainer.strict import apply_overrides, read_yaml, validated

_FORMER = "before"
"""What a key's `json_schema_extra` calls the behaviour from before the key existed."""


def load_stored(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration that a run directory holds, and apply overrides as `load_config` does.

    A key that it lacks means the behaviour from before that key existed (`before`, said at the key).

    Raises:
        InputError: as `load_config`.
    """
    data = read_yaml(path)
    apply_overrides(Config, data, overrides)
    return stored_config(data, f"{path} with overrides" if overrides else path)


def stored_config(data: dict[str, Any], where: str | Path) -> Config:
    """The configuration that a run directory or an export holds as plain data; see `load_stored`."""
    return validated(Config, with_former(Config, data, {}), where)


def continued(config: Config, stored: Sequence[Path]) -> Config:
    """The configuration of a training that goes on in a run directory which another training has begun.

    A key that neither `config` nor the kept configuration names means the behaviour from before that key existed, not
    its default.

    Args:
        config: as the user gives it.
        stored: where the run directory may hold a configuration; the first that exists counts.
    """
    path = next((path for path in stored if path.exists()), None)
    if path is None:
        return config
    given = config.model_dump(mode="json", exclude_unset=True)
    return validated(Config, with_former(Config, given, read_yaml(path)), path)


def with_former(model: type[BaseModel], data: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the `before` of each key of `model` that neither `data` nor `stored` has.

    A value of a wrong type stays as it is, for the validation to refuse.
    """
    found = dict(data)
    for name, field in model.model_fields.items():
        inner, section, kept = section_of(field.annotation), found.get(name, {}), _mapping(stored.get(name))
        if inner is None:
            if name not in found and name not in stored and _FORMER in (extra := _extra(field)):
                found[name] = extra[_FORMER]
        elif not isinstance(section, Mapping):
            continue
        elif get_origin(field.annotation) is not dict:
            if filled := with_former(inner, section, kept):
                found[name] = filled
        elif name in found:
            found[name] = {
                key: with_former(inner, value, _mapping(kept.get(key))) if isinstance(value, Mapping) else value
                for key, value in section.items()
            }
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _extra(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
