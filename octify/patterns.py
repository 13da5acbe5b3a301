"""Which rule matches a module: globs and regular expressions on module paths, globs on class names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Literal

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Pattern:
    """What a rule matches: module paths by glob or regular expression, or class names by glob."""

    kind: Literal["match", "type", "regex"]
    text: str

    def __str__(self) -> str:
        return f'{self.kind} "{self.text}"'


class Finder:
    """Finds the patterns that match a module: on its path, on the path of a module that holds it, or on its class.

    >>> finder = Finder([Pattern("match", "layer1.0"), Pattern("match", "layer?.*"), Pattern("type", "Conv?d")])
    >>> finder.first("layer1.0.conv1", "Conv2d"), finder.first("layer1.1.conv1", "Conv2d"), finder.first("fc", "Linear")
    (0, 1, None)
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self.patterns = patterns
        self.exact: dict[str, list[int]] = {}  # a plan written as a recipe has hundreds of these
        self.on_path: list[tuple[int, re.Pattern[str]]] = []
        self.on_type: list[tuple[int, re.Pattern[str]]] = []
        for index, pattern in enumerate(patterns):
            if pattern.kind == "match" and not _WILD.search(pattern.text):
                self.exact.setdefault(pattern.text, []).append(index)
                continue
            regex = re.compile(pattern.text if pattern.kind == "regex" else translate(pattern.text))
            (self.on_type if pattern.kind == "type" else self.on_path).append((index, regex))

    def first(self, path: str, type_name: str) -> int | None:
        """The position of the first pattern that matches, if any does."""
        return min(self.all(path, type_name), default=None)

    def all(self, path: str, type_name: str) -> Iterator[int]:
        """The positions of all patterns that match, in no particular order."""
        paths = list(_holders(path))
        for holder in paths:
            yield from self.exact.get(holder, ())
        for index, regex in self.on_path:
            if any(regex.fullmatch(holder) for holder in paths):
                yield index
        for index, regex in self.on_type:
            if regex.fullmatch(type_name):
                yield index


def closest_names(pattern: Pattern, modules: Iterable[tuple[str, str]]) -> list[str]:
    """Up to three names of modules (path, class name) that a pattern without a match may have meant."""
    if pattern.kind == "type":
        names = sorted({type_name for _, type_name in modules})
    else:
        names = sorted({holder for path, _ in modules for holder in _holders(path)})
    wanted = re.sub(r"[*?\\^$()]", "", pattern.text).strip(".")
    return difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)


def _holders(path: str) -> Iterator[str]:
    """A path and those of the modules around it, from the inside out: a.b.c, a.b, a."""
    while path:
        yield path
        path = path.rpartition(".")[0]
