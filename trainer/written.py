"""YAML by the core schema of YAML 1.2, where a number remembers how it is written.

PyYAML reads YAML 1.1: 010 is 8, NO is false, 12:30 is 750, 2024-01-01 is a date. Here leading zeros are decimal, only
true and false are booleans, and all else that is no number or null is text (https://yaml.org/spec/1.2.2/#103-core-schema).
A number or boolean comes with its text, as a `Written`: a subject 001 stays 001 where a label is wanted, and is 1 where
a number is. Keys are text as written. Merge keys (`<<`) work as in PyYAML; a key that is given twice is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.errors import InputError

MOST_DIGITS = 1000
"""A longer number counts as text, which no number's key takes: Python would refuse to print it."""

_TAG = "tag:yaml.org,2002:"
_STR, _NULL, _MERGE = _TAG + "str", _TAG + "null", _TAG + "merge"
_BOOL, _INT, _FLOAT = _TAG + "bool", _TAG + "int", _TAG + "float"
CORE_SCHEMA = (
    (_NULL, r"null|Null|NULL|~|", "nN~"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)
"""Tag, regular expression of the plain scalars that have it, and the characters that these may begin with."""


@dataclass(frozen=True, repr=False)
class Written:
    """A number or boolean that stands in a YAML text without quotes.

    Attributes:
        text: as it is written.
        tag: bool, int or float.
    """

    text: str
    tag: str

    def __repr__(self) -> str:
        return self.text

    @property
    def value(self) -> bool | int | float | str:
        """What it is by the core schema; the text of a number that is far too long."""
        if self.tag == "bool":
            return {"true": True, "false": False}[self.text.lower()]
        if len(self.text) > MOST_DIGITS:
            return self.text
        if self.tag == "float":
            return float(self.text.replace(".", "", 1) if self.text.lower()[-3:] in ("inf", "nan") else self.text)
        bases = {"0o": 8, "0x": 16}
        return int(self.text, bases.get(self.text[:2], 10))


class _Composer(yaml.SafeLoader):
    """SafeLoader's scanner and parser; its implicit tags are those of the core schema, and `<<`."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either version of YAML would not read as text."""


_Composer.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in CORE_SCHEMA:
    for _class in (_Composer, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first) + [""] * (_tag == _NULL))
_Composer.add_implicit_resolver(_MERGE, re.compile(r"^<<$"), ["<"])


def yaml_text(value: Any) -> str:
    """Mappings, lists and plain values as YAML that reads back to them, whatever version of YAML reads it."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return text


def parse_written(text: str, name: str = "<text>", *, comments: bool = True) -> Any:
    """The mappings, lists, texts, nulls and `Written` of a YAML text.

    Args:
        text: one YAML document.
        name: of the file, for errors.
        comments: False where `# ...` behind the value is a mistake and no comment.

    Raises:
        InputError: it is malformed, or has a key twice, with the line; a tag that is none of the core schema's.
    """
    node = _compose(text, name)
    rest = text[node.end_mark.index if node else 0 :].strip()
    if rest and not comments:
        raise InputError(name, "YAML takes a part for a comment", found=rest, fix="Put the value in quotes.")
    return _Reader(name).value(node) if node else None


def core(value: Any) -> Any:
    """What `parse_written` gave as plain Python values, by the core schema."""
    if isinstance(value, Written):
        return value.value
    if isinstance(value, dict):
        return {key: core(inner) for key, inner in value.items()}
    return [core(inner) for inner in value] if isinstance(value, list) else value


def _compose(text: str, name: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Composer(text)
        loader.name = name
        node: yaml.Node | None = loader.get_single_node()
        return node
    except yaml.reader.ReaderError as error:  # it knows no line, and ends its message in one of its own
        line = f" (line {text.count(chr(10), 0, error.position) + 1})"
        found = f"the character U+{ord(text[error.position]):04X}"
        raise InputError(
            name, f"not valid YAML{line}", found=found, expected="no such character", fix="Delete it."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise InputError(name, f"not valid YAML{line}", found=getattr(error, "problem", error)) from error
    except RecursionError as error:
        raise InputError(name, "not valid YAML", found="brackets within brackets without an end") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Reader:
    """Turns the nodes of one document into values; what an alias stands for is read anew, so no two places share it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[yaml.Node] = []

    def value(self, node: yaml.Node) -> Any:
        """The value of a node. Raises InputError."""
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is other for other in self._open):
            raise self._error(node, "an alias stands for what it is in")
        self._open.append(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            found: Any = [self.value(item) for item in node.value]
        elif isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            found = self._mapping(node)
        else:
            raise self._error(node, "unknown tag", found=node.tag)
        self._open.pop()
        return found

    def _scalar(self, node: yaml.ScalarNode) -> str | Written | None:
        if node.tag in (_STR, _MERGE):
            return str(node.value)
        if node.tag == _NULL:
            return None
        kind = node.tag.removeprefix(_TAG)
        patterns = [pattern for tag, pattern, _ in CORE_SCHEMA if tag == node.tag]
        if not any(re.fullmatch(pattern, node.value) for pattern in patterns):  # !!int abc, !!timestamp 2024-01-01
            raise self._error(node, f"{node.value!r} is no {kind}" if patterns else "unknown tag", found=node.tag)
        return Written(node.value, kind)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """A mapping's own keys over those that `<<` brings; a later `<<` over an earlier one, as in PyYAML."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged |= self._merged(value_node)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key is no text", found=key_node.id)
            if key_node.value in own:
                raise self._error(key_node, f"{key_node.value}: given twice", fix="Keep one of them.")
            own[key_node.value] = self.value(value_node)
        return {**merged, **own}

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        """What `<<` brings: a mapping, or of several the first one's value of each key."""
        found = self.value(node)
        mappings = found if isinstance(found, list) else [found]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise self._error(node, "<<", expected="a mapping, or a list of mappings")
        return {key: value for mapping in reversed(mappings) for key, value in mapping.items()}

    def _error(self, node: yaml.Node, what: str, **words: Any) -> InputError:
        return InputError(self._name, f"{what} (line {node.start_mark.line + 1})", **words)
