"""Octave convolutions as the primitive operations that they are made of, so that graph passes can see them.

Before: OctConv(high, low) → getitem 0, getitem 1.
After:  join([conv hh], [conv lh]) and join([conv ll, conv hl of the pooled map], []).
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, fx, nn

from octify.graph import get_module, set_module, shape_of, value_of
from octify.kernels import fits_always
from octify.layers import OctConv
from octify.optimize.forms import Carrier, Enter, Leave, LowPool, OutSize, empty_high, join
from octify.pooling import OctPool
from octify.resample import average, pool_low, up_to
from octify.routes import Route

DENSE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Value = fx.Node | tuple[fx.Node, fx.Node]


def expand_convs(module: fx.GraphModule) -> int:
    """Expands every octave convolution in place; returns how many."""
    count = 0
    homes: dict[str, OctConv] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        target = str(node.target)
        conv = homes.get(target) or get_module(module, target)
        if not isinstance(conv, OctConv):
            continue
        if target not in homes:
            homes[target] = conv
            set_module(module, target, _paths_of(conv))
        with module.graph.inserting_before(node):
            _replace(node, _Expansion(module.graph, target, conv).run(*_inputs(node)))
        count += 1
    return count


def expand_pools(module: fx.GraphModule) -> int:
    """Before: OctPool(high, low) → getitem 0, getitem 1.   After: the source's pooling of high, and LowPool of low."""
    count = 0
    for node in list(module.graph.nodes):
        pool = get_module(module, str(node.target)) if node.op == "call_module" else None
        if not isinstance(pool, OctPool):
            continue
        target = f"{node.target}_{count}"  # one module may be called with and without a high band
        home = nn.Module()
        has_high = (shape_of(value_of(node.args[0])) or (0, 0))[1] > 0
        home.add_module("high", pool.window.module() if has_high else Carrier(pool.window))
        home.add_module("low", LowPool(pool))
        set_module(module, target, home)
        high, low = cast("tuple[fx.Node, fx.Node]", node.args)
        with module.graph.inserting_before(node):
            pooled = module.graph.call_module(f"{target}.high", (high,))
            _replace(node, (pooled, module.graph.call_module(f"{target}.low", (low, pooled))))
        count += 1
    return count


def _inputs(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    high = cast(fx.Node, node.args[0])
    return high, cast("fx.Node | None", node.args[1] if len(node.args) > 1 else None)


def _replace(node: fx.Node, value: Value) -> None:
    if isinstance(value, fx.Node):
        node.replace_all_uses_with(value)
    else:
        for reader in list(node.users):
            assert reader.target is operator.getitem, f"{reader} reads a pair of bands as a whole"
            band = value[cast(int, reader.args[1])]
            band.meta = dict(reader.meta)
            reader.replace_all_uses_with(band)
            reader.graph.erase_node(reader)
    node.graph.erase_node(node)


def _paths_of(conv: OctConv) -> nn.Module:
    """One dense convolution per path, and what some paths do around theirs."""
    home = nn.Module()
    for path, given in conv.routes.items():
        route = pad_instead(conv, given)
        home.add_module(path, _dense(conv, path, route))
        if _enters(route):
            home.add_module(f"{path}_enter", Enter(route))
        if route.crop:
            home.add_module(f"{path}_leave", Leave(route))
    home.add_module("size", OutSize(conv._halved))  # pyright: ignore[reportPrivateUsage]
    return home.eval()


def pad_instead(conv: OctConv, route: Route) -> Route:
    """The same path with zeros on the left alone where the convolution's own, on both sides, have to be cropped.

    Runtimes take such zeros into the convolution, and then it computes nothing that is thrown away.
    """
    axes = conv._axes  # pyright: ignore[reportPrivateUsage]
    if not route.crop or route.pads or route.same or isinstance(route.padding, str):
        return route
    right = [0] * len(axes)
    for dim in range(-len(axes), 0):
        left, taps = route.padding[dim], route.taps[dim]
        if dim not in route.crop:
            right[dim] = left
            continue
        fitting = [n for n in range(left) if fits_always(axes[dim], taps, route.low[dim], n)]
        if not fitting or taps.first != -left:
            return route
        right[dim] = fitting[0]
    amounts = tuple(n for pair in zip(reversed(route.padding), reversed(right), strict=True) for n in pair)
    return replace(route, padding=(0,) * len(axes), pads=(("constant", amounts),), crop=())


def _enters(route: Route) -> bool:
    return bool(route.same or route.pads or route.pick)


def _dense(conv: OctConv, path: str, route: Route) -> nn.Module:
    weight = cast(Tensor, getattr(conv, f"weight_{path}"))
    bias = _bias_of(conv, path)
    groups: int = conv._groups[path]  # pyright: ignore[reportPrivateUsage]
    made: Any = DENSE[conv.dim](
        weight.shape[1] * groups,
        weight.shape[0],
        cast(Any, tuple(weight.shape[2:])),
        cast(Any, route.stride),
        cast(Any, route.padding),
        cast(Any, route.dilation),
        groups,
        bias is not None,
        device="meta",
    )
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _bias_of(conv: OctConv, path: str) -> Tensor | None:
    """A band's bias is given once, on the path from the same band; else on the only path that there is."""
    band = path[1]
    own = band * 2 if band * 2 in conv.paths else path
    return cast("Tensor | None", getattr(conv, f"bias_{band}")) if path == own else None


class _Expansion:
    """One call of an octave convolution."""

    def __init__(self, graph: fx.Graph, target: str, conv: OctConv) -> None:
        self.graph, self.target, self.conv = graph, target, conv
        self.size_node: fx.Node | None = None

    def run(self, high: fx.Node, low: fx.Node | None) -> Value:
        conv = self.conv
        self.source = high
        if conv._pool and conv._takes_high:  # pyright: ignore[reportPrivateUsage]
            high = self.graph.call_function(average, (high, conv._pool))  # pyright: ignore[reportPrivateUsage]
        if not conv._gives_low:  # pyright: ignore[reportPrivateUsage]
            return self._to_high(high, low)
        low_out = self._to_low(high, low)
        if not conv._gives_high:  # pyright: ignore[reportPrivateUsage]
            return self.graph.call_function(empty_high, (low_out, self._size())), low_out
        return self._to_high(high, low), low_out

    def _size(self) -> fx.Node:
        if self.size_node is None:
            self.size_node = self.graph.call_module(f"{self.target}.size", (self.source,))
        return self.size_node

    def _path(self, path: str, x: fx.Node) -> fx.Node:
        route = pad_instead(self.conv, self.conv.routes[path])
        if _enters(route):
            x = self.graph.call_module(f"{self.target}.{path}_enter", (x, self._size()))
        elif route.pool:
            x = self.graph.call_function(average, (x, route.pool))
        x = self.graph.call_module(f"{self.target}.{path}", (x,))
        if route.crop:
            x = self.graph.call_module(f"{self.target}.{path}_leave", (x, self._size()))
        return x

    def _to_high(self, high: fx.Node, low: fx.Node | None) -> fx.Node:
        if "lh" not in self.conv.paths or low is None:
            return self._path("hh", high)
        raised = self._path("lh", low)
        if "hh" not in self.conv.paths:
            return self._lift(raised)
        own = self._path("hh", high)
        if self.conv._lift:  # pyright: ignore[reportPrivateUsage]
            return self.graph.call_function(join, ([own], [raised], self.conv.spatial))
        return self.graph.call_function(join, ([own, raised], [], self.conv.spatial))

    def _lift(self, raised: fx.Node) -> fx.Node:
        if not self.conv._lift:  # pyright: ignore[reportPrivateUsage]
            return raised
        return self.graph.call_function(up_to, (raised, self._size()))

    def _to_low(self, high: fx.Node, low: fx.Node | None) -> fx.Node:
        if "hl" not in self.conv.paths:
            return self._path("ll", cast(fx.Node, low))
        pooled = self.graph.call_function(pool_low, (high, self.conv.spatial))
        if "ll" not in self.conv.paths or low is None:
            return self._path("hl", pooled)
        return self.graph.call_function(
            join, ([self._path("ll", low), self._path("hl", pooled)], [], self.conv.spatial)
        )
