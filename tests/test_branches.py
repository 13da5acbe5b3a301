"""Sources whose control flow depends on the input's size run at every size, over one set of weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import octify
from octify.branches import takes_branches
from octify.errors import TraceError
from octify.graph import meta_copy
from octify.layers import Merge, Split
from octify.oracles import ReplicatePadding

SHAPE = (2, 3, 64, 64)  # needs neither padding nor resizing
OTHERS = ((1, 3, 64, 64), (1, 3, 63, 64), (2, 3, 66, 70), (1, 3, 61, 75))


class Decoder(nn.Module):
    """Pads to whole strides, and resizes where a decoder's map does not fit: as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
        self.join, self.head = nn.Conv2d(80, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if width % 4:
            x = F.pad(x, (0, 4 - width % 4, 0, 0))
        x = torch.relu(self.stem(x))
        down = self.down(x)
        maps = [x]
        for found in (down, self.deep(down)):
            up = F.interpolate(found, scale_factor=2 if found is down else 4)
            if up.shape[2:] != x.shape[2:]:
                up = F.interpolate(up, size=x.shape[2:])
            maps.append(up)
        return self.head(torch.relu(self.join(torch.cat(maps, 1))))[:, :, :height, :width]


class OtherLayers(Decoder):
    """Odd heights go through a layer that the example's did not read in this layout."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if x.shape[2] % 2:
            x = F.interpolate(torch.sort(self.down(x), -1)[0], size=x.shape[2:])[:, :16]
        else:
            x = F.interpolate(self.down(x), size=x.shape[2:])[:, :16]
        return self.head(torch.relu(self.join(torch.cat((x, x, x, x, x), 1))))


def converted(model: nn.Module, alpha: float = 0.5, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    return octify.convert(model, alpha=alpha, example_inputs=shape).eval()


@torch.no_grad()
def test_nothing_low_gives_the_same_bits_whatever_the_branches() -> None:
    source = Decoder().eval()
    same = converted(source, 0.0)
    assert octify.plan_of(same).how == "guarded" and takes_branches(same.graph)
    for size in (*OTHERS, SHAPE, *OTHERS):
        x = torch.randn(size)
        assert torch.equal(same(x), source(x))


@torch.no_grad()
def test_another_size_gives_what_a_conversion_for_it_gives() -> None:
    source = Decoder().eval()
    model = converted(source)
    for size in OTHERS:
        x = torch.randn(size)
        assert torch.equal(model(x), converted(source, shape=size)(x))
        assert meta_copy(model)(x.to("meta")).shape == x[:, :1].expand(-1, 4, -1, -1).shape


def test_the_choice_of_a_graph_is_not_counted() -> None:
    model, x = meta_copy(converted(Decoder())), torch.empty(OTHERS[0], device="meta")
    counts: list[int] = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@torch.no_grad()
def test_a_much_smaller_size_keeps_the_layouts_of_the_example() -> None:
    source = Decoder().eval()
    model, x = converted(source), torch.randn(1, 3, 15, 18)
    with ReplicatePadding():
        flat = x[:, :, :1, :1].expand_as(x).contiguous()
        assert torch.allclose(model(flat), source(flat), atol=1e-5)
    assert all(not isinstance(layer, Split | Merge) for layer in model.modules())


def test_every_branch_trains_the_one_set_of_weights() -> None:
    model = converted(Decoder()).train()
    names = [name for name, _ in model.named_parameters()]
    for size in OTHERS:
        before = model.down[1].high.running_mean.clone()
        model(torch.randn(size)).square().mean().backward()
        assert all(value.grad is not None for value in model.parameters())
        assert not torch.equal(before, model.down[1].high.running_mean)
        model.zero_grad()
    assert names == [name for name, _ in model.named_parameters()]


@torch.no_grad()
def test_copies_pickles_and_checkpoints_know_the_branches(tmp_path: Path) -> None:
    model = converted(Decoder())
    octify.save(model, tmp_path / "net.safetensors")
    loaded = octify.load(tmp_path / "net.safetensors", model=Decoder())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        for size in (SHAPE, *OTHERS):
            x = torch.randn(size)
            assert torch.equal(model(x), other(x))
    model.double().head.weight_hh.zero_()
    model.head.weight_lh.zero_()
    for size in OTHERS:
        flat = model(torch.randn(size).double())
        assert torch.equal(flat, flat[:, :, :1, :1].expand_as(flat))


@torch.no_grad()
def test_the_inference_form_refuses_other_branches() -> None:
    model = converted(Decoder())
    fast, x = octify.optimize(model, example_inputs=SHAPE), torch.randn(SHAPE)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    with pytest.raises(TraceError, match="another branch"):
        fast(torch.randn(OTHERS[1]))


def test_a_pickle_of_a_local_class_knows_one_way() -> None:
    class Local(Decoder):
        pass

    loaded = pickle.loads(pickle.dumps(converted(Local())))
    assert loaded(torch.randn(SHAPE)).shape == (*SHAPE[:1], 4, *SHAPE[2:])
    with pytest.raises(TraceError, match="cannot be pickled"):
        loaded(torch.randn(OTHERS[1]))


def test_a_branch_that_the_layers_do_not_fit_is_refused() -> None:
    model = converted(OtherLayers())
    assert model(torch.randn(SHAPE)).shape == (2, 4, 64, 64)
    with pytest.raises(TraceError, match="1x3x61x75 takes the source through another branch") as caught:
        model(torch.randn(OTHERS[3]))
    assert "join would be" in str(caught.value)
