"""Channel classes: which channels share one bit, and which of them become low."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from octify.layout import Layout
from octify.recipe import Recipe, Settings
from octify.rules.base import Ids

Ranking = Mapping[str, Sequence[float]]


@dataclass
class _Writer:
    """An operation that makes channels: a convolution."""

    name: str
    module: str
    settings: Settings
    ids: Ids


@dataclass
class Bundle:
    """Classes written by the same convolutions: alpha is a share of a bundle."""

    writers: tuple[str, ...]
    members: list[int]
    alpha: float
    round_to: int = 1
    group: dict[int, int] = field(default_factory=dict[int, int])
    groups: int = 1


class Classes:
    """A union-find over channels with what operations want of them; chooses one bit a class."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.pinned: dict[int, str] = {}
        self.reads: set[int] = set()
        self.closes: set[int] = set()
        self.wants: set[int] = set()
        self.writers: list[_Writer] = []
        self.balances: list[tuple[str, Ids, int]] = []
        self.bits: dict[int, bool] = {}
        self.notes: list[str] = []
        self.bundles: list[Bundle] = []
        self._notes: dict[str, list[str]] = defaultdict(list)
        self._now = ("", "", Recipe.uniform(0.0).settings_for("", ""))

    # What rules call while an operation is at hand.

    def begin(self, name: str, module: str | None, settings: Settings) -> None:
        """Names the operation that the next calls are about."""
        self._now = (name, module or name, settings)

    def follow(self, count: int) -> Ids:
        """New channels without a writer."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def free(self, count: int) -> Ids:
        """New channels that the operation at hand writes."""
        ids = self.follow(count)
        self.write(ids)
        return ids

    def high(self, count: int, why: str = "") -> Ids:
        """New channels that must be high, for a reason."""
        ids = self.follow(count)
        self.pinned.update(dict.fromkeys(ids.tolist(), why))
        self.writers.append(_Writer(*self._now, ids))
        return ids

    def write(self, ids: Ids) -> None:
        """Gives the operation's alpha a say in these channels."""
        self.writers.append(_Writer(*self._now, ids.ravel()))

    def pin(self, ids: Ids, why: str) -> None:
        """Says that existing channels must be high."""
        self.pinned.update(dict.fromkeys(ids.ravel().tolist(), why))

    def tie(self, first: Ids, second: Ids) -> None:
        """Makes two equally long sets the same, channel by channel."""
        if first is second:
            return
        for a, b in zip(first.ravel().tolist(), second.ravel().tolist(), strict=True):
            root_a, root_b = self.find(a), self.find(b)
            if root_a != root_b:
                self.parent[max(root_a, root_b)] = min(root_a, root_b)

    def balance(self, ids: Ids, groups: int) -> None:
        """Asks for equally many low channels in each group."""
        self.balances.append((self._now[0], ids.ravel(), groups))

    def read(self, ids: Ids) -> None:
        """A convolution reads these channels in any layout."""
        self.reads.update(ids.ravel().tolist())

    def close(self, ids: Ids) -> None:
        """A pooling over the whole map reads these channels in any layout."""
        self.closes.update(ids.ravel().tolist())

    def want_dense(self, ids: Ids) -> None:
        """A reader needs these channels as one dense map."""
        self.wants.update(ids.ravel().tolist())

    def note(self, text: str) -> None:
        """A line about the operation at hand."""
        self._notes[self._now[0]].append(text)

    # The choice.

    def find(self, channel: int) -> int:
        """The representative of a channel's class: its oldest member."""
        parent = self.parent
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    def choose(self, ranking: Ranking) -> None:
        """Gives every class its bit."""
        self.roots = self._roots()
        self.high_roots = self._classes(self.pinned)
        self.bits_of = np.zeros(len(self.parent), dtype=bool)
        self.bundles = self._bundles()
        self._balance_bundles()
        scores = self._scores(ranking)
        for bundle in self.bundles:
            for member in _pick(bundle, scores):
                self.bits_of[member] = True
        self._apply_layouts()

    def _roots(self) -> Ids:
        """Every channel's representative; a channel's parent is older than it, or itself."""
        roots = np.array(self.parent, np.int64)
        while not np.array_equal(older := roots[roots], roots):
            roots = older
        return roots

    def _classes(self, channels: Collection[int]) -> set[int]:
        """The classes of some channels."""
        return set(self.roots[np.fromiter(channels, np.int64, len(channels))].tolist())

    def _bundles(self) -> list[Bundle]:
        reads, closes, wants = (self._classes(found) for found in (self.reads, self.closes, self.wants))
        writers: dict[int, list[int]] = defaultdict(list)
        for index, writer in enumerate(self.writers):
            for root in np.unique(self.roots[writer.ids]).tolist():
                writers[root].append(index)
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for root in sorted(writers):
            useful = root in reads or (root in closes and root not in wants)
            if root not in self.high_roots and useful:
                groups[tuple(writers[root])].append(root)
        return [self._bundle(key, members) for key, members in groups.items()]

    def _bundle(self, key: tuple[int, ...], members: list[int]) -> Bundle:
        writers = [self.writers[index] for index in key]
        alphas = {writer.module: writer.settings.alpha for writer in writers}
        alpha = min(alphas.values())
        if len(set(alphas.values())) > 1:
            least = min(alphas, key=lambda module: alphas[module])
            text = f"takes alpha {alpha:g} of {least}, which writes the same channels"
            for writer in writers:
                if writer.settings.alpha != alpha:
                    self._notes[writer.name].append(text)
        round_to = max(writer.settings.round_to for writer in writers)
        return Bundle(tuple(alphas), members, alpha, round_to)

    def _balance_bundles(self) -> None:
        owner = {member: bundle for bundle in self.bundles for member in bundle.members}
        for name, ids, groups in self.balances:
            rows = np.reshape(self.roots[ids], (groups, -1))
            where: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
            for group, row in enumerate(rows.tolist()):
                for root in dict.fromkeys(row):
                    if root in owner:
                        where[id(owner[root])][group].append(root)
            for bundle in self.bundles:
                if id(bundle) in where:
                    self._balance(bundle, where[id(bundle)], groups, name)

    def _balance(self, bundle: Bundle, where: dict[int, list[int]], groups: int, name: str) -> None:
        """Partitions a bundle so that every group of one grouped convolution gets equally many low channels."""
        even = len(where) == groups and len({len(members) for members in where.values()}) == 1
        # Groups that hold the same classes (the branches of a sum) are balanced whatever is chosen.
        apart = {frozenset(members): members for members in where.values()}
        if even and len(apart) == 1:
            return None
        group = {root: index for index, members in enumerate(apart.values()) for root in members}
        groups = len(apart)
        covers = len(group) == len(bundle.members) == sum(map(len, apart.values()))
        if not even or not covers:
            return self._leave(bundle, name, "its channels do not lie evenly in the groups")
        if bundle.groups == 1:
            bundle.group, bundle.groups = group, groups
        elif _refines(bundle.group, group):
            pass
        elif _refines(group, bundle.group):
            bundle.group, bundle.groups = group, groups
        else:
            return self._leave(bundle, name, "two grouped convolutions divide its channels differently")
        return None

    def _leave(self, bundle: Bundle, name: str, why: str) -> None:
        bundle.alpha = 0.0
        self._notes[name].append(why)

    def _scores(self, ranking: Ranking) -> dict[int, float]:
        """A score a class, the mean over its writers; the lowest go low first, and ties go to the last channels."""
        total: dict[int, list[float]] = defaultdict(list)
        for writer in self.writers:
            if writer.module in ranking:
                for root, score in zip(self.roots[writer.ids].tolist(), ranking[writer.module], strict=True):
                    total[root].append(float(score))
        return {root: sum(scores) / len(scores) for root, scores in total.items()}

    def _apply_layouts(self) -> None:
        """Layouts written in the recipe overrule the choice."""
        for writer in self.writers:
            if writer.settings.layout is None:
                continue
            asked = Layout.parse(writer.settings.layout)
            roots = self.roots[writer.ids]
            for root, low in zip(roots.tolist(), asked.bits, strict=False):
                self.bits_of[root] = low and root not in self.high_roots

    # The answers.

    @property
    def splits(self) -> bool:
        """Whether anything is low."""
        return bool(self.bits_of.any())

    def layout(self, ids: Ids) -> Layout:
        """The layout of a value with these channels."""
        return Layout.of(self.bits_of[self.roots[ids.ravel()]].tolist())

    def notes_of(self, name: str) -> list[str]:
        """The lines about one operation."""
        return self._notes.get(name, [])

    def reason(self, name: str) -> str:
        """Why the channels that an operation writes are all high, if something forced them."""
        for writer in self.writers:
            if writer.name != name:
                continue
            forced = [self.pinned[i] for i in writer.ids.tolist() if self.pinned.get(i)]
            if forced:
                return forced[0]
            if writer.settings.alpha == 0:
                return "alpha 0"
            roots = set(self.roots[writer.ids].tolist())
            if roots <= self.high_roots:
                return "joined with channels that must stay high"
            if roots.isdisjoint(self._classes(self.reads)):
                return "every reader needs a dense map"
            return self._too_few(writer)
        return ""

    def _too_few(self, writer: _Writer) -> str:
        alpha = writer.settings.alpha
        roots = set(self.roots[writer.ids].tolist())
        bundle = next((b for b in self.bundles if not roots.isdisjoint(b.members)), None)
        if bundle is None or bundle.groups == 1:
            return f"alpha {alpha:g} of {len(writer.ids)} channels is less than one"
        each = len(bundle.members) // bundle.groups
        return f"alpha {alpha:g} of {each} channels per group is less than one; nearest {1 / each:g}"


def _refines(fine: dict[int, int], coarse: dict[int, int]) -> bool:
    """Whether every group of `fine` lies within one group of `coarse`."""
    seen: dict[int, int] = {}
    return all(seen.setdefault(fine[root], coarse[root]) == coarse[root] for root in fine)


def _pick(bundle: Bundle, scores: Mapping[int, float]) -> list[int]:
    """The classes of a bundle that become low: int(alpha * size) in every group."""
    parts: dict[int, list[int]] = defaultdict(list)
    for member in bundle.members:
        parts[bundle.group.get(member, 0)].append(member)
    chosen: list[int] = []
    for members in parts.values():
        count = int(bundle.alpha * len(members) + 1e-9)
        total = count * len(parts) // bundle.round_to * bundle.round_to
        count = total // len(parts) if len(parts) > 1 else total
        order = sorted(members, key=lambda member: (scores.get(member, 0.0), -member))
        chosen += order[:count]
    return chosen
