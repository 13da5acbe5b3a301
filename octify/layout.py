"""Which channels of a value are low: one bit per channel, in the source model's channel order."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Layout:
    """One bit per channel, True where the channel is low.

    Bits rather than two counts, because concatenation interleaves: `48h16l24h8l`. With bits, `cat` is `+`, `chunk` is
    slicing, and any layer's weight is `weight[out_index][:, in_index]`.

    >>> layout = Layout.last(64, low=16)
    >>> str(layout), layout.high, layout.low
    ('48h16l', 48, 16)
    >>> str(layout + Layout.parse("24h8l"))
    '48h16l24h8l'
    >>> str(layout[40:52])
    '8h4l'
    """

    bits: tuple[bool, ...]

    @classmethod
    def dense(cls, channels: int) -> Layout:
        """All channels high."""
        return cls((False,) * channels)

    @classmethod
    def last(cls, channels: int, low: int) -> Layout:
        """The last `low` channels low, the paper's choice.

        Raises:
            ValueError: `low` is negative or more than `channels`.
        """
        if not 0 <= low <= channels:
            raise ValueError(f"cannot make {low} of {channels} channels low: expected 0 to {channels}")
        return cls((False,) * (channels - low) + (True,) * low)

    @classmethod
    def of(cls, bits: Iterable[bool]) -> Layout:
        """A layout from any iterable of truth values."""
        return cls(tuple(map(bool, bits)))

    @classmethod
    @lru_cache(maxsize=4096)  # a plan says the same few over and over
    def parse(cls, text: str) -> Layout:
        """The inverse of `str`.

        Raises:
            ValueError: the text is not a sequence of counts with `h` or `l` behind each.
        """
        compact = re.sub(r"[\s+]", "", text)
        if not re.fullmatch(r"(\d+[hl])*", compact):
            raise ValueError(f'"{text}" is not a layout: expected counts such as 48h16l')
        runs = re.findall(r"(\d+)([hl])", compact)
        return cls(tuple(kind == "l" for count, kind in runs for _ in range(int(count))))

    def __str__(self) -> str:
        return "".join(f"{len(list(run))}{'l' if low else 'h'}" for low, run in itertools.groupby(self.bits))

    def __deepcopy__(self, memo: object) -> Layout:
        return self  # nothing in it changes

    def __len__(self) -> int:
        return len(self.bits)

    def __add__(self, other: Layout) -> Layout:
        return Layout(self.bits + other.bits)

    def __getitem__(self, index: slice) -> Layout:
        return Layout(self.bits[index])

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.bits)

    @cached_property
    def low(self) -> int:
        """How many channels are low."""
        return sum(self.bits)

    @property
    def high(self) -> int:
        """How many channels are high."""
        return self.channels - self.low

    @property
    def is_dense(self) -> bool:
        """Whether no channel is low, so that the value is one tensor."""
        return self.low == 0

    @cached_property
    def high_index(self) -> tuple[int, ...]:
        """The high channels' positions in the source order."""
        return tuple(channel for channel, low in enumerate(self.bits) if not low)

    @cached_property
    def low_index(self) -> tuple[int, ...]:
        """The low channels' positions in the source order."""
        return tuple(channel for channel, low in enumerate(self.bits) if low)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """For each source channel, its position in `cat(high, low)`."""
        where = {channel: position for position, channel in enumerate(self.high_index + self.low_index)}
        return tuple(where[channel] for channel in range(self.channels))


def run_of(index: Sequence[int]) -> Sequence[int]:
    """The same positions as a range where each follows the one before: short in a graph's code, and quick to know.

    >>> run_of((3, 4, 5)), run_of((3, 5))
    (range(3, 6), (3, 5))
    """
    run = range(index[0], index[0] + len(index)) if index else range(0)
    return run if tuple(index) == tuple(run) else tuple(index)
