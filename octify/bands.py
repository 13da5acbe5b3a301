"""Which paths a convolution has between two layouts, and which part of its weight each of them takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from octify.errors import ConversionError
from octify.layout import Layout

Alpha = float | tuple[float, float]
PATHS = ("hh", "hl", "lh", "ll")  # from, to


def is_depthwise(in_channels: int, groups: int) -> bool:
    """Whether every input channel has output channels of its own."""
    return groups > 1 and groups == in_channels


def last_low(channels: int, groups: int, alpha: float) -> Layout:
    """`int(alpha * channels)` low channels at the end; of grouped channels, the same share at the end of each group."""
    if not 0 <= alpha <= 1:
        raise ConversionError(f"alpha is {alpha}: expected a share of the channels, 0 to 1")
    each = channels // groups
    return Layout(Layout.last(each, int(alpha * each)).bits * groups)


def choose_layouts(
    channels: tuple[int, int], groups: int, alpha: Alpha, layouts: tuple[Layout | None, Layout | None]
) -> tuple[Layout, Layout]:
    """The given layouts, or the last `int(alpha * channels)` channels low where there is none."""
    if any(count % groups for count in channels):
        raise ConversionError(f"{channels[0]} → {channels[1]} channels cannot be parted into {groups} groups")
    shares = alpha if isinstance(alpha, tuple) else (alpha, alpha)
    depthwise = is_depthwise(channels[0], groups)
    first, second = layouts
    first = first or last_low(channels[0], 1 if depthwise else groups, shares[0])
    if second is None and depthwise:
        times = channels[1] // channels[0]
        second = Layout.of(bit for bit in first.bits for _ in range(times))
    second = second or last_low(channels[1], groups, shares[1])
    for layout, count in zip((first, second), channels, strict=True):
        if layout.channels != count:
            raise ConversionError(f"layout {layout} has {layout.channels} channels: expected {count}")
    return first, second


def check_layouts(in_layout: Layout, out_layout: Layout, groups: int) -> None:
    """Refuses layouts under which a grouped convolution would not stay one.

    Raises:
        ConversionError: a depthwise convolution whose output bits are not its input's, or groups with different counts.
    """
    if groups == 1:
        return
    if is_depthwise(in_layout.channels, groups):
        times = out_layout.channels // in_layout.channels
        wanted = Layout.of(bit for bit in in_layout.bits for _ in range(times))
        if wanted != out_layout:
            raise ConversionError(
                f"a depthwise convolution of {in_layout} gives {wanted}, not {out_layout}: it keeps its input's layout"
            )
        return
    for name, layout in (("input", in_layout), ("output", out_layout)):
        each = layout.channels // groups
        counts = sorted({layout[start : start + each].low for start in range(0, layout.channels, each)})
        if len(counts) > 1:
            raise ConversionError(
                f"the {name} layout {layout} has {counts[0]} to {counts[-1]} low channels in {groups} groups: "
                "expected the same number in each"
            )


def choose_paths(in_layout: Layout, out_layout: Layout, groups: int, paths: Iterable[str]) -> tuple[str, ...]:
    """The paths there are, less those not in `paths`; the only path into a band stays, or the band would be empty."""
    asked = tuple(paths)
    unknown = [path for path in asked if path not in PATHS]
    if unknown:
        raise ConversionError(f'no path is called "{unknown[0]}": expected some of {", ".join(PATHS)}')
    counts = {"h": (in_layout.high, out_layout.high), "l": (in_layout.low, out_layout.low)}
    there = [path for path in PATHS if counts[path[0]][0] and counts[path[1]][1]]
    if is_depthwise(in_layout.channels, groups):
        there = [path for path in there if path[0] == path[1]]

    def keeps(path: str) -> bool:
        rivals = [other for other in there if other[1] == path[1] and other in asked]
        return path in asked or not rivals

    return tuple(path for path in there if keeps(path))


def path_groups(path: str, in_layout: Layout, groups: int) -> int:
    """How many groups a path's convolution has."""
    if not is_depthwise(in_layout.channels, groups):
        return groups
    return in_layout.high if path[0] == "h" else in_layout.low


def swap_sides(weight: Tensor, groups: int) -> Tensor:
    """(out, in/groups, …) to (in, out/groups, …) and back: a transposed convolution stores its weight that way."""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    grouped = weight.reshape(groups, rows, columns, *weight.shape[2:]).transpose(1, 2)
    return grouped.reshape(groups * columns, rows, *weight.shape[2:])


def path_weight(weight: Tensor, path: str, in_layout: Layout, out_layout: Layout, groups: int) -> Tensor:
    """The part of a weight (out, in/groups, …) that connects the path's two bands, in the bands' channel order."""
    rows = out_layout.high_index if path[1] == "h" else out_layout.low_index
    if is_depthwise(in_layout.channels, groups):
        return take(weight, 0, rows)
    columns = in_layout.high_index if path[0] == "h" else in_layout.low_index
    if groups == 1:
        return take(take(weight, 0, rows), 1, columns)
    inside, outside = in_layout.channels // groups, out_layout.channels // groups
    parts: list[Tensor] = []
    for group in range(groups):
        own_rows = [row for row in rows if row // outside == group]
        own_columns = [column % inside for column in columns if column // inside == group]
        parts.append(take(take(weight, 0, own_rows), 1, own_columns))
    return torch.cat(parts)


def take(x: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """`index_select` by plain numbers: a view where they run on."""
    if tuple(index) == tuple(range(index[0], index[0] + len(index))):
        return x.narrow(dim, index[0], len(index))
    return x.index_select(dim, torch.tensor(index, device=x.device))
