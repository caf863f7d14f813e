"""YAML files into strict pydantic models, with errors that a person can act on.

The configuration and the description of a data set are both YAML read by people in a hurry: an unknown key is an
error that suggests the nearest one, a key given twice is an error, `3e-4` is a number (YAML 1.1 reads it as text), and
`12:00:00` is text (YAML 1.1 reads it as a number to base 60).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import InputError


class StrictModel(BaseModel):
    """A frozen section of a YAML file that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Model = TypeVar("Model", bound=BaseModel)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][0-9_]*|0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+)$",
    "tag:yaml.org,2002:float": r"^[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$"
    r"|^\.(nan|NaN|NAN)$",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise InputError(
                    node.start_mark.name,
                    f"{key}: given twice (line {key_node.start_mark.line + 1})",
                    fix="Keep one of them.",
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def parse_yaml(text: str, name: str = "<text>") -> Any:
    """The value of a YAML text. Raises InputError with the line where it is malformed."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise InputError(name, f"not valid YAML{line}", found=getattr(error, "problem", error)) from error
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises InputError where the file is missing or is no mapping."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(path, f"cannot be read: {reason}", fix="Check the path.") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise InputError(path, "the file", found=type(data).__name__, expected="a mapping of keys to values")
    return data


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys and their values."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def validated(model: type[Model], data: Any, where: str | Path) -> Model:
    """`data` as `model`; the first mistake becomes an InputError that names file, key, found and expected."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _as_input_error(model, error, where) from error


def apply_overrides(model: type[BaseModel], data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key.sub=value` overrides (values are YAML) into `data`, which will be read as `model`. Raises InputError."""
    for override in overrides:
        _apply(model, data, override)


def _apply(model: type[BaseModel], data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(override, "not an override", expected="key=value, e.g. stage1.lr=1e-3")
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        known = known_keys(model, sections[:depth])
        if known and section not in known:
            nearest = difflib.get_close_matches(section, known, n=1, cutoff=0.5)
            hint = f"Did you mean {'.'.join([*sections[:depth], nearest[0]])}?" if nearest else None
            raise InputError("command line", f"{key}: unknown key", fix=hint)
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError("command line", f"{key}: {section} is no section", found=repr(inner))
        data = inner
    data[last] = parse_yaml(text, f"command line ({key})")


def _as_input_error(model: type[BaseModel], error: ValidationError, where: str | Path) -> InputError:
    unknown_first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = unknown_first[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    more = f"{len(unknown_first) - 1} more mistake(s) follow." if len(unknown_first) > 1 else None
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], known_keys(model, location[:-1]), n=1, cutoff=0.5)
        hint = f"Did you mean {'.'.join([*location[:-1], nearest[0]])}?" if nearest else more
        return InputError(where, f"{key}: unknown key", fix=hint)
    if first["type"] == "missing":
        return InputError(where, f"{key}: missing", expected="a value", fix=more)
    if first["type"] == "value_error":
        return InputError(where, f"{key}: {first['msg'].removeprefix('Value error, ')}".lstrip(": "), fix=more)
    expected = first["msg"].removeprefix("Input should be ")
    return InputError(where, key, found=repr(first["input"]), expected=expected, fix=more)


def known_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """The keys that `model` knows at a dotted location; none where names are free."""
    current: Any = model
    for part in location:
        if get_origin(current) is dict or get_origin(current) in (list, tuple):
            current = get_args(current)[-1]
        else:
            fields = current.model_fields if _is_model(current) else {}
            current = fields[part].annotation if part in fields else None
        current = _without_none(current)
    return list(current.model_fields) if _is_model(current) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation
