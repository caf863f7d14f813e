"""YAML files into strict pydantic models, with errors that a person can act on.

The configuration and the description of a data set are both YAML read by people in a hurry: an unknown key is an
error that suggests the nearest one, a key given twice is an error, and a value becomes what its key declares: the text
as it is written, or the number or boolean of YAML 1.2's core schema (trainer/written.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from trainer.errors import InputError
from trainer.text import read_text
from trainer.written import Written, core, parse_written

# Whatever is counted has an upper bound: a slip of the keyboard is refused here, not by the memory of a node.
Positive = Annotated[int, Field(gt=0, le=10**9)]
NotNegative = Annotated[int, Field(ge=0, le=10**9)]
Size = Annotated[int, Field(gt=0, le=10**6)]
"""A number of which memory needs a multiple: widths, TRs, windows, samples."""
Few = Annotated[int, Field(gt=0, le=1000)]
"""A number of things of which each is large: blocks, heads, processes."""


class StrictModel(BaseModel):
    """A frozen section of a YAML file that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def as_declared(annotation: Any, value: Any) -> Any:
    """A value of `parse_written` as a key of this type takes it: text as written, or what the core schema says."""
    if isinstance(value, Written):
        return _scalar(_kinds(annotation), value)
    if isinstance(value, list):
        return [as_declared(declared(annotation, ["0"]), item) for item in value]
    if isinstance(value, dict):
        return {key: as_declared(declared(annotation, [key]), item) for key, item in value.items()}
    return value


def _scalar(kinds: Sequence[Any], value: Written) -> Any:
    if not any(map(_is_text, kinds)):
        return value.value
    if not any(kind in (int, float, bool) for kind in kinds):
        return value.text
    # either will do: the number where it is written as Python writes it, so that nothing is lost
    return value.value if value.tag == "bool" or str(core(value)) == value.text else value.text


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without None and without what pydantic is told about them."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) if member is not type(None) for kind in _kinds(member)]
    return [annotation]


def _is_text(kind: Any) -> bool:
    """Whether a type holds text, or a list of texts: a label that stands there without its list is named as written."""
    if get_origin(kind) is list:
        return any(map(_is_text, _kinds(get_args(kind)[0])))
    return kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str))


def parse_yaml(text: str, name: str = "<text>") -> Any:
    """The value of a YAML text by the core schema. Raises InputError with the line where it is malformed."""
    return core(parse_written(text, name))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, as `parse_written` gives it, for `validated`.

    Raises:
        InputError: the file is missing, malformed or no mapping.
    """
    data = parse_written(read_text(path), str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise InputError(path, "the file", found=found, expected="a mapping of keys to values")
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
        return model.model_validate(as_declared(model, data))
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
    data[last] = parse_written(text, f"command line ({key})", comments=False)


def _as_input_error(model: type[BaseModel], error: ValidationError, where: str | Path) -> InputError:
    unknown_first = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = unknown_first[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    more = f"{len(unknown_first) - 1} more mistake(s) follow." if len(unknown_first) > 1 else None
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], known_keys(model, location[:-1]), n=1, cutoff=0.5)
        hint = f"Did you mean {'.'.join([*location[:-1], nearest[0]])}?" if nearest else more
        # a byte order mark or a zero-width space in a key would be seen by nobody
        return InputError(where, f"{key if key.isprintable() else ascii(key)}: unknown key", fix=hint)
    if first["type"] == "missing":
        return InputError(where, f"{key}: missing", expected="a value", fix=more)
    if first["type"] == "value_error":
        return InputError(where, f"{key}: {first['msg'].removeprefix('Value error, ')}".lstrip(": "), fix=more)
    bounds = _bounds(declared(model, location))
    if first["type"] in _KINDS:
        expected = ", ".join(filter(None, [_KINDS[first["type"]], bounds]))
    else:
        expected = first["msg"].removeprefix("Input should be ")
    return InputError(where, key, found=_shown(first["input"]), expected=expected, fix=more)


_KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text, in quotes where YAML would read something else",
    **dict.fromkeys(("greater_than", "greater_than_equal", "less_than", "less_than_equal"), ""),
}
"""What pydantic's types of errors ask for."""


def _shown(value: object) -> str:
    """A value as it stands in YAML."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def _bounds(annotation: Any) -> str:
    """The range of a number's type in words; empty where there is none."""
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    found = [
        (word, getattr(fact, name))
        for fact in _facts(annotation)
        for name, word in words.items()
        if hasattr(fact, name)
    ]
    return " and ".join(f"{word} {bound}" for word, bound in found)


def _facts(annotation: Any) -> list[Any]:
    """What an annotation tells pydantic beside the type."""
    if get_origin(annotation) is Annotated:
        inner, *facts = get_args(annotation)
        return [
            *_facts(inner),
            *(f for fact in facts for f in (fact.metadata if isinstance(fact, FieldInfo) else [fact])),
        ]
    if get_origin(annotation) in (Union, UnionType):
        return [fact for member in get_args(annotation) for fact in _facts(member)]
    return []


def declared(annotation: Any, location: Sequence[str]) -> Any:
    """The type that a model, or a type made of models, declares at a dotted location; Any where it declares nothing."""
    current = annotation
    for part in location:
        for kind in _kinds(current):
            if _is_model(kind) and part in kind.model_fields:
                field = kind.model_fields[part]
                current = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
                break
            if get_origin(kind) in (dict, list):
                current = get_args(kind)[-1]
                break
        else:
            return Any
    return current


def known_keys(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The keys that `model` knows at a dotted location; none where names are free."""
    return [key for kind in _kinds(declared(model, location)) if _is_model(kind) for key in kind.model_fields]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
