"""Octify's own kernels compute what PyTorch's do, for any geometry, size and number of threads."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame, LayerNorm2d, ScaledStdConv2d
from torch import Tensor, fx, nn
from torch.nn import functional as F

import octify
from octify.errors import BackendError
from octify.graph import meta_copy, record_values
from octify.optimize import build, flatten, optimize
from octify.optimize.forms import ACTS, join
from octify.optimize.native import Program, load_library, lower_native, program, why_not
from octify.optimize.native.packing import Kernel, cut, pack_weight, panels_of
from octify.resample import pool_low
from tests.test_optimize import ready

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"octify's kernels need a C++ compiler: {why_not()}")


def lowered(net: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, list[Program]]:
    """A traced module with programs in place, and those."""
    tracer = fx.Tracer()
    module = fx.GraphModule(net, tracer.trace(net))
    record_values(meta_copy(module).eval(), module.graph, tuple(x.to("meta") for x in inputs))
    lower_native(module)
    return module, [part for part in module.modules() if isinstance(part, Program)]


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 2e-6 * (1 + wanted.abs().max()))


NUMBERS = {"hardtanh": " -0.5 0.7", "leaky_relu": " 0.1", "elu": " 0.7"}
EVERY_ACT = ["", *(act + NUMBERS.get(act, "") for act in ACTS)]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, Tensor]:
    """A convolution and an image that it fits."""
    each = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))
    kernel, stride, padding, dilation = zip(draw(each), draw(each), strict=True)
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    take, give = draw(st.integers(1, 9)), draw(st.integers(1, 21))
    if draw(st.booleans()):
        groups, take = draw(st.integers(2, 24)), draw(st.sampled_from((1, 2, 4)))
        give = take
    conv = nn.Conv2d(take * groups, give * groups, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    least = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [draw(st.integers(low, low + 12)) for low in least]
    return conv, torch.randn(draw(st.integers(1, 3)), take * groups, *size)


class Sum(nn.Module):
    """act(conv(x) + plain + up(low)), and its average over 2 by 2."""

    def __init__(self, conv: nn.Conv2d, act: str) -> None:
        super().__init__()
        self.conv, self.act = conv, act

    def forward(self, x: Tensor, plain: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        out = join([plain, self.conv(x)], [low], 2, self.act)
        return out, pool_low(out, 2)


fx.wrap("join")
fx.wrap("pool_low")


@settings(max_examples=60, deadline=None)
@given(case=convolutions(), act=st.sampled_from(EVERY_ACT), threads=st.sampled_from((1, 3)))
def test_a_sum_of_any_geometry(case: tuple[nn.Conv2d, Tensor], act: str, threads: int) -> None:
    conv, x = case
    with torch.no_grad():
        shape = conv(x).shape
        plain, low = torch.randn(shape), torch.randn(*shape[:2], *((size + 1) // 2 for size in shape[2:]))
        module, programs = lowered(Sum(conv, act), x, plain, low)
        assert len(programs) == 1 and not any(node.target is join for node in module.graph.nodes)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found = module(x, plain, low)
        torch.set_num_threads(before)
        wanted = Sum(conv, act)(x, plain, low)
    assert all(close(a, b) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    kernel=st.sampled_from((1, 2, 3, 5)), stride=st.integers(1, 3), group=st.sampled_from((1, 2, 4)),
    groups=st.integers(2, 20), size=st.tuples(st.integers(7, 23), st.integers(7, 30)), threads=st.sampled_from((1, 3)),
)  # fmt: skip
def test_convolutions_of_small_groups_are_summed(
    kernel: int, stride: int, group: int, groups: int, size: tuple[int, int], threads: int
) -> None:
    """Of several kernels in one step, with all that a step adds, in rows shorter and longer than a tile."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = group * groups
            self.one = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=groups)
            self.other = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups)

        def forward(self, x: Tensor, plain: Tensor, low: Tensor) -> Tensor:
            return join([plain, self.one(x), self.other(x)], [low], 2, "relu")

    net, x = Net().eval(), torch.randn(2, group * groups, *size)
    with torch.no_grad():
        if net.one(x).shape != net.other(x).shape:
            return
        plain = torch.randn(net.other(x).shape)
        low = torch.randn(*plain.shape[:2], *((length + 1) // 2 for length in plain.shape[2:]))
        module, programs = lowered(net, x, plain, low)
        assert [step.kind.name for step in programs[0].steps] == ["GROUPED"]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found = module(x, plain, low)
        torch.set_num_threads(before)
        assert close(found, net(x, plain, low))


class Gated(nn.Module):
    """A squeeze-and-excitation block, whose gated map is read by 1x1 convolutions alone, or by another one too."""

    def __init__(self, wide: int, mean: str, act: str, reader: nn.Module) -> None:
        super().__init__()
        self.first, self.reader, self.mean = nn.Conv2d(3, wide, 3, padding=1), reader, mean
        self.squeeze, self.excite, self.gate = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1), nn.Hardsigmoid()
        self.pool, self.act = nn.AdaptiveAvgPool2d(1), {"relu": nn.ReLU(), "silu": nn.SiLU(), "": None}[act]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        squeezed = self.pool(x) if self.mean == "pool" else x.mean((2, 3), keepdim=True)
        gate = self.gate(self.excite(F.relu(self.squeeze(squeezed))))
        gated = x * gate if self.mean == "pool" else gate * x
        return self.reader(gated if self.act is None else self.act(gated))


@pytest.mark.parametrize("mean", ["pool", "method"])
@pytest.mark.parametrize("act", ["", "relu", "silu"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_gates(mean: str, act: str, kernel: int) -> None:
    net = Gated(21, mean, act, nn.Conv2d(21, 7, kernel, padding=kernel // 2)).eval()
    for size in ((2, 3, 12, 17), (3, 3, 5, 4)):
        x = torch.randn(size)
        with torch.no_grad():
            module, programs = lowered(net, x)
            assert len(programs) == 1 and [node.op for node in module.graph.nodes].count("call_module") == 1
            assert close(module(x), net(x))


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_gates_over_both_bands(alpha: float) -> None:
    """Also at odd sizes, where the low band's last position stands for one instead of two."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1), Gated(20, "pool", "relu", nn.Conv2d(20, 8, 1)), nn.Conv2d(8, 4, 1))
    net[1].first = nn.Conv2d(16, 20, 1)
    octave_net = octify.convert(net.eval(), alpha=alpha, example_inputs=(1, 3, 32, 32)).eval()
    example = (torch.empty(1, 3, 32, 32, device="meta"),)
    form = build._with_programs(flatten(octave_net, example), example)
    assert form is not None and [node.op for node in form.graph.nodes].count("call_module") == 1
    with torch.no_grad():
        for size in ((32, 32), (31, 33), (17, 30)):
            x = torch.randn(2, 3, *size)
            assert close(form(x), octave_net(x)), size


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.integers(1, 4), stride=st.integers(1, 3), dilation=st.integers(1, 2), size=st.integers(7, 19),
    channels=st.integers(1, 40), ceil_mode=st.booleans(),
)  # fmt: skip
def test_max_pooling_norms_and_concatenation(
    kernel: int, stride: int, dilation: int, size: int, channels: int, ceil_mode: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 1)
            self.pool = nn.MaxPool2d(kernel, stride, kernel // 2, dilation, ceil_mode=ceil_mode)
            self.norm = nn.BatchNorm2d(2 * channels)

        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(self.conv(x))
            return F.silu(self.norm(torch.cat([y, y], 1)))

    net = Net().eval()
    with torch.no_grad():
        for value in (*net.norm.parameters(), net.norm.running_mean, net.norm.running_var):
            value.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, size, size + 1)
        module, programs = lowered(net, x)
        assert len(programs) == 1 and len(module.graph.nodes) == 3
        assert close(module(x), net(x))


@pytest.mark.parametrize(
    "groups,take,give",
    [(32, 4, 4), (3, 5, 10), (8, 2, 2), (2, 9, 21), (2, 12, 24), (3, 7, 20), (16, 8, 8), (1, 7, 48), (1, 9, 40)],
)
def test_panels_of_half_the_width(groups: int, take: int, give: int) -> None:
    """For small groups, whose panels would read what they do not need, and for the last channels of any layer."""
    net = nn.Sequential(nn.Conv2d(groups * take, groups * give, 3, padding=1, groups=groups), nn.ReLU())
    x = torch.randn(2, groups * take, 13, 9)
    with torch.no_grad():
        module, programs = lowered(net, x)
        assert len(programs) == 1 and close(module(x), net(x))


@pytest.mark.parametrize("first", [nn.Identity(), nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(6)])
def test_a_map_pooled_again_and_again(first: nn.Module) -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.convs = first, nn.ModuleList(nn.Conv2d(6, 5, 1) for _ in range(4))

        def forward(self, x: Tensor) -> list[Tensor]:
            maps = [self.first(x)]
            for _ in range(3):
                maps.append(pool_low(maps[-1], 2))
            return [conv(y) for conv, y in zip(self.convs, maps, strict=True)]

    net, x = Pools().eval(), torch.randn(2, 6, 19, 13)
    with torch.no_grad():
        module, programs = lowered(net, x)
        assert len(programs) == 1
        assert all(close(found, wanted) for found, wanted in zip(module(x), net(x), strict=True))


def test_what_is_not_a_number_stays_so() -> None:
    x = torch.full((1, 8, 4, 4), float("nan"))
    for act in ("", "relu", "hardtanh 0 6", "hardswish", "gelu"):
        net = Sum(nn.Conv2d(8, 8, 3, padding=1), act)
        module, _ = lowered(net, x, torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2))
        with torch.no_grad():
            assert module(x, torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 2, 2))[0].isnan().all(), act


@pytest.mark.parametrize("shape", [(12, 20, 1), (24, 36, 6), (40, 40, 10), (6, 90, 3), (48, 48, 2), (60, 40, 2)])
def test_panels_hold_every_weight_of_every_group_once(shape: tuple[int, int, int]) -> None:
    inputs, outputs, groups = shape
    weight = torch.randn(outputs, inputs // groups, 3, 2)
    whole = torch.zeros(outputs, inputs, 6)
    for group in range(groups):
        rows, columns = outputs // groups, inputs // groups
        part = slice(group * rows, (group + 1) * rows)
        whole[part, group * columns : (group + 1) * columns] = weight[part].flatten(2)
    kernel = Kernel.of(weight.shape, groups)
    for panels in (panels_of([kernel], 16), cut(outputs, groups, 16), cut(outputs, 1, 16)):
        packed, starts = pack_weight(weight, groups, panels)
        assert [channel for panel in panels for channel in range(panel.first, panel.first + panel.outputs)] == [
            *range(outputs)
        ]
        again = torch.zeros(outputs, inputs, 6)
        for panel, rows, start in zip(panels, packed, starts, strict=True):
            assert rows.shape[2] == panel.width in (8, 16) and panel.outputs <= panel.width
            assert not rows[..., panel.outputs :].any()
            place = slice(panel.first, panel.first + panel.outputs)
            again[place, start : start + rows.shape[1]] = rows[..., : panel.outputs].permute(2, 1, 0)
        assert torch.equal(again, whole)


def test_panels_are_cut_where_that_saves_products() -> None:
    """24 channels a group as one wide and one narrow panel; groups too small for panels of their own side by side."""
    widths = [panel.width for panel in panels_of([Kernel(48, 24, 9, 2)], 16)]
    assert widths == [16, 8, 16, 8]
    assert {panel.width for panel in panels_of([Kernel(64, 32, 9, 2)], 16)} == {16}
    assert {panel.outputs for panel in panels_of([Kernel(48, 3, 9, 16)], 16)} == {8}


def octave() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                        nn.Conv2d(32, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 8, 1))  # fmt: skip
    return octify.convert(net, alpha=0.5, example_inputs=(1, 3, 32, 32)).eval()


def form_of(net: nn.Module) -> fx.GraphModule:
    """The form that octify's kernels run, whichever measures faster."""
    example = (torch.empty(1, 3, 32, 32, device="meta"),)
    form = build._with_programs(flatten(net, example), example)
    assert form is not None
    return form


def test_a_compiler_takes_a_program_for_one_operator() -> None:
    net = octave()
    compiled, image = torch.compile(form_of(net), fullgraph=True), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert close(compiled(image), net(image))


def test_threads_share_a_form_and_copies_and_pickles_run() -> None:
    net = octave()
    form = form_of(net)
    images = [torch.rand(1, 3, 32 + i, 40) for i in range(8)]
    with torch.no_grad():
        wanted = [net(image) for image in images]
    wrong: list[int] = []

    def run(index: int, model: nn.Module) -> None:
        with torch.no_grad():
            if not all(close(model(images[index]), wanted[index]) for _ in range(20)):
                wrong.append(index)

    workers = [threading.Thread(target=run, args=(index, form)) for index in range(len(images))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    for other in (copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
        run(0, other)
    assert not wrong


def test_values_that_never_live_together_share_memory() -> None:
    blocks = [module for _ in range(6) for module in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    x = torch.rand(1, 8, 32, 32)
    _, (only,) = lowered(nn.Sequential(*blocks), x)
    _, total = only._places(only.sizes([(1, 8, 32, 32)]))
    assert total <= 2 * x.numel(), "one map read and one written at a time"


def test_without_a_compiler_onednn_runs_it_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    net, image = octave(), torch.rand(1, 3, 32, 32)
    form = form_of(net)
    monkeypatch.setattr(build, "why_not", lambda: "no C++ compiler")
    other = optimize(net, "eager")
    with torch.no_grad():
        assert close(other(image), net(image))
    assert not any(isinstance(module, Program) for module in other.modules())
    monkeypatch.setattr(program, "load_library", lambda: None)
    with pytest.raises(BackendError, match="needs octify's kernels"):
        form(image)


def test_the_kernels_are_built_into_the_cache_and_used_again(tmp_path: Path) -> None:
    code = "from octify.optimize.native import load_library, why_not; print(load_library() is not None, why_not())"
    environment = os.environ | {"OCTIFY_CACHE": str(tmp_path / "new"), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    builds = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert all(build.communicate()[0].startswith(b"True") for build in builds)
    (built,) = (tmp_path / "new").iterdir()
    assert built.suffix == ".so"
    broken = {**environment, "CXX": "/no/such/compiler"}
    found = subprocess.run(command, env=broken, capture_output=True, text=True, check=True)
    assert "False" in found.stdout and "/no/such/compiler" in found.stdout


def test_the_library_is_one_for_the_process() -> None:
    assert load_library() is load_library()


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2, 2), nn.AvgPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 2, 1),
     nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 1, 1)],
    ids=str,
)  # fmt: skip
def test_poolings_of_both_bands_are_part_of_the_program(pool: nn.Module) -> None:
    """At even and odd sizes, where the low band's last position is one of its own or none."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), pool, nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    octave_net = octify.convert(net, alpha=0.5, example_inputs=(1, 3, 64, 64)).eval()
    example = (torch.empty(1, 3, 64, 64, device="meta"),)
    form = build._with_programs(flatten(octave_net, example), example)
    assert form is not None and sum(isinstance(part, Program) for part in form.modules()) == 1
    assert [node.op for node in form.graph.nodes].count("call_module") == 1
    with torch.no_grad():
        for size in ((64, 64), (61, 59), (62, 31), (47, 50), (33, 35)):
            x = torch.randn(2, 3, *size)
            assert close(form(x), octave_net(x)), size


class Learned(nn.Module):
    """What is the same for all images of a batch: a number a channel, and a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.scale, self.place = nn.Parameter(torch.rand(1, 8, 1, 1)), nn.Parameter(torch.rand(1, 8, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.conv(x) * self.scale) + self.place)


def test_what_is_learned_holds_for_every_image_of_a_batch() -> None:
    net = Learned().eval()
    form = build._with_programs(flatten(net, (torch.empty(1, 3, 12, 12, device="meta"),)),
                                (torch.empty(1, 3, 12, 12, device="meta"),))  # fmt: skip
    assert form is not None
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        assert close(form(x), net(x))


def program_of(net: nn.Module, *, alpha: float = 0.5, size: int = 48) -> tuple[fx.GraphModule, nn.Module]:
    """An octave network's form with programs, and the network."""
    octave_net = octify.convert(net.eval(), alpha=alpha, example_inputs=(1, 3, size, size)).eval()
    example = (torch.empty(1, 3, size, size, device="meta"),)
    form = build._with_programs(flatten(octave_net, example), example)
    assert form is not None
    return form, octave_net


class Block(nn.Module):
    """A residual block around what a function makes of a map of 24 channels."""

    def __init__(self, body: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.body = nn.ModuleList(layers), body
        self.first, self.last = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            y = layer(y)
        return x + self.last(self.body(y))


class Scaled(nn.Module):
    """ConvNeXt's scale of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.gamma.reshape(1, -1, 1, 1))


class Shifted(nn.Module):
    """One learned number for all channels, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([-0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) + self.bias


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def split(x: Tensor) -> Tensor:
    one, two, three = x.split([5, 11, 8], 1)
    return torch.cat((three, F.relu(one), two), 1)


BLOCKS: dict[str, Callable[[], Block]] = {
    "layer norm": lambda: Block(F.gelu, LayerNorm2d(24)),
    "layer scale": lambda: Block(torch.sigmoid, nn.Conv2d(24, 24, 1), Scaled()),
    "learned numbers": lambda: Block(torch.tanh, Shifted()),
    "numbers": lambda: Block(lambda x: (1 - 2 * F.silu(x)) / 3),
    "difference": lambda: Block(lambda x: x - F.elu(x)),
    "product": lambda: Block(lambda x: F.relu(x) * x),
    "gate by position": lambda: Block(lambda x: x * x.mean(1, keepdim=True).sigmoid()),
    "slices": lambda: Block(lambda x: torch.cat((x[:, 7:], x[:, :7]), 1)),
    "every other": lambda: Block(lambda x: torch.cat((x[:, ::2], x[:, 1::2]), 1)),
    "shuffle": lambda: Block(shuffled),
    "split": lambda: Block(split),
    "chunks": lambda: Block(lambda x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1) + x),
    "upsampling": lambda: Block(lambda x: F.interpolate(x, scale_factor=2.0), nn.MaxPool2d(2), nn.MaxPool2d(1, 1)),
    "norm and activation": lambda: Block(F.relu, BatchNormAct2d(24), nn.ReLU(), BatchNormAct2d(24)),
    "padded by size": lambda: Block(F.relu, Conv2dSame(24, 24, 3), nn.BatchNorm2d(24)),
    "standardised": lambda: Block(F.relu, ScaledStdConv2d(24, 24, 3, padding=1)),
    "average": lambda: Block(F.relu, nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_a_program_holds(name: str, alpha: float) -> None:
    """In one program, at even and odd sizes, for batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), BLOCKS[name](), nn.Conv2d(24, 4, 1))
    form, octave_net = program_of(ready(net), alpha=alpha)
    calls = [node.target for node in form.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    held = name not in ("gate by position", "chunks")  # a mean over channels and repetition run on PyTorch
    assert len(calls) == 1 or not held, calls
    with torch.no_grad():
        for size in ((48, 48), (52, 30), (47, 45)):
            if name == "upsampling" and size[0] % 2:
                continue
            x = torch.randn(2, 3, *size)
            assert close(form(x), octave_net(x)), size


def test_strided_layers_at_odd_sizes_and_bands_without_high_channels() -> None:
    class Net(nn.Module):
        """What repeats the edge on the low grid, pools both bands, and merges what is added to a dense map."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 2, 2)
            self.pool, self.body = nn.AvgPool2d(3, 2, 1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
            self.last = nn.Conv2d(16, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            x = F.relu(self.down(x))
            return self.last(F.relu(self.body(x)) + self.pool(x))

    for alpha in (0.5, 1.0):
        form, octave_net = program_of(Net(), alpha=alpha, size=64)
        assert [node.op for node in form.graph.nodes].count("call_module") == 1
        with torch.no_grad():
            for size in ((64, 64), (66, 70), (61, 59), (63, 65)):
                x = torch.randn(2, 3, *size)
                assert close(form(x), octave_net(x)), (alpha, size)


def test_parts_of_inputs_and_outputs() -> None:
    """A part of what comes in or goes out lies in memory that each call brings."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = F.relu(self.one(x[:, 2:7]))
            return y, y[:, 1:3], self.two(y[:, 2:]) + self.two(x[:, 4:])

    net = Net().eval()
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        module, programs = lowered(net, x)
        assert len(programs) == 1
        for _ in range(2):
            x = torch.randn(2, 8, 9, 7)
            assert all(close(found, wanted) for found, wanted in zip(module(x), net(x), strict=True))


def test_a_form_with_functions_between_its_programs_pickles() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Softmax2d(),
                        nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1))  # fmt: skip
    form, octave_net = program_of(net)
    assert sum(isinstance(part, Program) for part in form.modules()) > 1
    x = torch.randn(1, 3, 40, 44)
    with torch.no_grad():
        assert close(pickle.loads(pickle.dumps(form))(x), octave_net(x))
