"""Untrusted YAML text to plain data, with the line on which each value stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from octify.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_VALUES = 50_000  # as they stand in the text, and again with the aliases written out

Where = tuple[str | int, ...]  # the way to a value: keys and list positions

_TAG = "tag:yaml.org,2002:"
_PLAIN = yaml.constructor.SafeConstructor()
_SCALARS: dict[str, Callable[[yaml.ScalarNode], Any]] = {
    _TAG + "str": _PLAIN.construct_scalar,
    _TAG + "int": _PLAIN.construct_yaml_int,
    _TAG + "float": _PLAIN.construct_yaml_float,
    _TAG + "bool": _PLAIN.construct_yaml_bool,
    _TAG + "null": _PLAIN.construct_yaml_null,
}


@dataclass(frozen=True)
class Source:
    """What a text says, and where it says it.

    `lines` has the way to every value, the empty way for the text as a whole.
    """

    name: str
    data: Any
    lines: Mapping[Where, int]

    def place(self, where: Where) -> str:
        """`file:line` of a value, or of the nearest one around it; without lines, the way to it."""
        if not self.lines:
            return ": ".join([self.name, ".".join(str(step) for step in where)]) if where else self.name
        while where not in self.lines:
            where = where[:-1]
        return f"{self.name}:{self.lines[where]}"


def read_file(path: Path, name: str | None = None) -> Source:
    """Read a YAML file.

    Raises:
        RecipeError: it cannot be read, is too big, or is not the plain YAML that `read_text` takes.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{name}: is larger than {MAX_BYTES:,} bytes, which no recipe needs")
    try:
        return read_text(raw.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{name}:{line}: is not UTF-8 text") from error


def read_text(text: str, name: str) -> Source:
    """Read YAML of strings, numbers, booleans, nulls, lists and mappings with string keys; anchors and merges allowed.

    Raises:
        RecipeError: a syntax error, any other kind of value, a key given twice, or more nesting or aliases than a
            recipe needs.
    """
    try:
        root = _Composer(text, name).get_single_node()
        reader = _Reader(name)
        data = None if root is None else reader.value(root, ())
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, name)) from error
    return Source(name, data, {(): 1, **reader.lines})


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which is recursive, bounded in depth and size while it reads."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self.depth = 0
        self.count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH:
            raise RecipeError(f"{self.name}:{self.line + 1}: is nested more than {MAX_DEPTH} deep")
        if self.count > MAX_VALUES:
            raise RecipeError(f"{self.name}:{self.line + 1}: holds more than the {MAX_VALUES:,} values of a recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _syntax_message(error: yaml.YAMLError, name: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{name}: is not YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    place = name if mark is None else f"{name}:{mark.line + 1}"
    return f"{place}: is not YAML: {error.problem or error.context}"


class _Reader:
    """Turns composed nodes into data, noting lines. An alias is read again wherever it stands, and counted again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Where, int] = {}
        self.count = 0

    def value(self, node: yaml.Node, where: Where) -> Any:
        self.lines.setdefault(where, node.start_mark.line + 1)
        self.count += 1
        if self.count > MAX_VALUES or len(where) > MAX_DEPTH:
            raise self.error(node, "its aliases write out to more than a recipe may hold")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, where)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = cast("list[yaml.Node]", node.value)
            return [self.value(item, (*where, index)) for index, item in enumerate(items)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self.scalar(node)
        raise self.error(
            node, f"a value of kind {node.tag.removeprefix(_TAG)}: expected text (in quotes), a number, a list or keys"
        )

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return _SCALARS[node.tag](node)
        except (ValueError, LookupError) as error:
            raise self.error(node, f'"{node.value[:40]}" is no {node.tag.removeprefix(_TAG)}') from error

    def mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in self.pairs(node):
            self.lines[(*where, key.value)] = key.start_mark.line + 1
            result[key.value] = self.value(value, (*where, key.value))
        return result

    def pairs(self, node: yaml.MappingNode, depth: int = 0) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        """The keys written here, before those merged in by `<<` that are not written here."""
        if depth > MAX_DEPTH:
            raise self.error(node, "merges itself")
        own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        merged: list[tuple[yaml.ScalarNode, yaml.Node]] = []
        for key, value in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            if key.tag == _TAG + "merge":
                merged += self.merged(value, depth)
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
                raise self.error(key, "a key that is not text: put it in quotes")
            if key.value in own:
                first = own[key.value][0].start_mark.line + 1
                raise self.error(key, f'"{key.value}" is given twice, first in line {first}')
            own[key.value] = (key, value)
        for key, value in merged:
            own.setdefault(key.value, (key, value))
        return list(own.values())

    def merged(self, node: yaml.Node, depth: int) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        nodes = cast("list[yaml.Node]", node.value) if isinstance(node, yaml.SequenceNode) else [node]
        pairs: list[tuple[yaml.ScalarNode, yaml.Node]] = []
        for item in nodes:
            if not isinstance(item, yaml.MappingNode):
                raise self.error(item, "<< merges keys: expected *name of an anchored mapping")
            self.count += len(item.value)
            if self.count > MAX_VALUES:
                raise self.error(item, "its aliases write out to more than a recipe may hold")
            pairs += self.pairs(item, depth + 1)
        return pairs

    def error(self, node: yaml.Node, problem: str) -> RecipeError:
        return RecipeError(f"{self.name}:{node.start_mark.line + 1}: {problem}")
