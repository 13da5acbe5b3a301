"""Walking a network a stretch at a time: what it keeps, where, and that nothing depends on it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import octify
from octify.calibrate import store
from octify.calibrate.store import Shelf, Store
from octify.calibrate.walk import Walk, split_chunks


class Writing(nn.Module):
    """Writes into its input, into values that others read later, and through views of them; one reader is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv1(x.sub_(0.1))
        first, second = y.chunk(2, 1)
        z = self.conv2(y)
        second.mul_(2.0)
        z += self.shift
        z = self.relu(z)
        first.add_(z[:, :4])
        return torch.cat([y, z], 1), first


def walk_of(net: nn.Module, x: Tensor, memory: int) -> Walk:
    return Walk(net, fx.symbolic_trace(net).graph, split_chunks([x], 3), Store(memory))


def stops(found: Walk) -> Iterator[list[Any]]:
    """Ends a stretch before and behind every node but the inputs."""
    for node in found.nodes:
        if node.op not in ("placeholder", "get_attr"):
            found.run_before(node)
            found.run_through(node)
            yield list(found.values[node])


@pytest.mark.parametrize("memory", [0, 5_000, 1 << 30])
def test_a_walk_computes_what_the_network_does_wherever_it_stops(memory: int) -> None:
    net = Writing()
    x = torch.randn(7, 3, 9, 8).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        wanted = [net(part.clone()) for part in x.split(3)]
    found = walk_of(net, x, memory)
    assert all(len(values) == 3 for values in stops(found))
    for pair, expected in zip(found.run(), wanted, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(pair, expected, strict=True))
    assert torch.equal(x, before), "the images are not the network's to write into"


def activations_alive(size: int) -> int:
    """Bytes of all float maps of a size that Python knows of."""
    found = [value for value in gc.get_objects() if type(value) is Tensor and value.shape[2:] == (size, size)]
    return sum({value.data_ptr(): value.untyped_storage().nbytes() for value in found}.values())


@pytest.mark.parametrize("count", [3, 30])
def test_what_stays_in_memory_is_bounded_for_any_number_of_images(count: int) -> None:
    size, bound = 17, 20_000
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    x = torch.randn(count, 3, size, size)
    chunk = 3 * x[0].nbytes
    found = walk_of(net, x, bound)
    images = activations_alive(size)
    for node in found.nodes[1:]:
        found.run_through(node)
        for value in found.values[node]:
            assert activations_alive(size) <= images + bound + chunk
            del value
    assert images + bound - chunk <= activations_alive(size) or count == 3


def test_what_shares_a_storage_shares_it_in_the_file_too() -> None:
    shelf: Shelf[str] = Shelf(Store(0))
    whole = torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2)
    shelf.change(lambda _: {"whole": whole, "parts": (whole[:, :2], [whole[..., 1], "x"])})

    def write(values: dict[str, Any]) -> dict[str, Any]:
        values["parts"][0].zero_()
        return values

    shelf.change(write)
    assert torch.equal(shelf.look("whole")[:, :2], torch.zeros(2, 2, 3))
    assert shelf.look("whole").stride() == whole.stride() and shelf.look("parts")[1][1] == "x"
    assert torch.equal(shelf.look("parts")[1][0], shelf.look("whole")[..., 1])
    assert whole.count_nonzero() == 23, "what was kept is apart from what was given"


def test_a_calibration_gives_the_same_bytes_in_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)), nn.ReLU(True)
    )
    net = nn.Sequential(net, nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(9, 3, 32, 32)
    made: list[dict[str, Tensor]] = []
    for memory in (0, 60_000, 1 << 30):
        monkeypatch.setattr(store, "MEMORY", memory)
        converted = octify.convert(copy.deepcopy(net), calibration=x.split(4), alpha=0.5, example_inputs=(1, 3, 32, 32))
        made.append(converted.state_dict())
    assert all(torch.equal(made[0][name], other[name]) for other in made[1:] for name in made[0])
