"""The fidelity benchmark's pictures: the same every time, and no test picture's source in any other set."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from tests.fidelity import data
from tests.fidelity.data import DIGITS, PARTS, SIZE, Part, make_pictures, photo_columns
from tests.fidelity.nets import NETS, make_net
from tests.fidelity.prune import count_macs
from tests.fidelity.show import Result, read_results, retained_at, table, write_results


@pytest.mark.parametrize("part", PARTS)
def test_same_seed_same_bytes(part: Part) -> None:
    first, again = make_pictures(part, 6, seed=3), make_pictures(part, 4, seed=3)
    assert torch.equal(first.images[:4], again.images)
    assert torch.equal(first.labels[:4], again.labels)
    assert not torch.equal(first.images, make_pictures(part, 6, seed=4).images)


def test_shapes_and_classes() -> None:
    pictures = make_pictures("train", 120)
    assert pictures.images.shape == (120, 3, SIZE, SIZE)
    assert pictures.images.dtype == torch.uint8
    assert set(pictures.labels.tolist()) == set(range(data.CLASSES))
    batches = pictures.batches(50)
    assert [len(b) for b in batches] == [50, 50, 20]
    assert abs(float(torch.cat(batches).mean())) < 0.3
    assert 0.7 < float(torch.cat(batches).std()) < 1.3


@pytest.mark.parametrize(("part", "other"), [*itertools.combinations(PARTS, 2)])
def test_no_digit_in_two_sets(part: Part, other: Part) -> None:
    mine, theirs = (set(range(1797)[DIGITS[p]]) for p in (part, other))
    assert mine
    assert not mine & theirs


@pytest.mark.parametrize("part", ["train", "calibration"])
def test_backgrounds_of_the_test_are_its_own(part: Part) -> None:
    width = min(photo.shape[1] for photo in load_sample_images().images)
    mine, test = (set(range(width)[photo_columns(p)]) for p in (part, "test"))
    assert not mine & test
    assert mine | test == set(range(width))


def test_pictures_are_cut_from_their_own_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one half of the photographs black and the other white, and nothing painted, every picture shows its half."""
    photo = np.zeros((427, 640, 3), np.uint8)
    photo[:, data.BORDER :] = 255
    monkeypatch.setattr(data, "load_sample_images", lambda: type("Photos", (), {"images": [photo]}))
    data._photos.cache_clear()
    for part in PARTS:
        crops = [data._background(part, np.random.default_rng(i)) for i in range(8)]
        assert {float(c.mean()) for c in crops} == {1.0 if part == "test" else 0.0}
    data._photos.cache_clear()


@pytest.mark.parametrize("name", [*NETS])
def test_nets(name: str) -> None:
    net = make_net(name, seed=1).eval()
    twin, other = make_net(name, seed=1), make_net(name, seed=2)
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))
    assert not all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))
    sides: set[int] = set()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: sides.add(out.shape[-1]))
    assert net(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, data.CLASSES)
    assert {64, 32, 16, 8} <= sides
    assert 5e6 < count_macs(net) < 2e8


def result(seed: int, asked: float, cost: float, retained: float) -> Result:
    return Result("plain", seed, 256, "fold", "alpha", asked, cost, 0.5, retained / 2, retained, retained)


def test_table_reads_curves_at_a_cost(tmp_path: Path) -> None:
    results = [result(0, 0.25, 0.9, 0.8), result(0, 0.5, 0.7, 0.6), result(1, 0.25, 0.6, 0.5)]
    assert retained_at(results, 0.8) == pytest.approx([0.7, 0.75])
    assert retained_at(results, 0.65) == pytest.approx([0.5625])  # seed 0 does not reach down to it
    assert retained_at(results, 0.5) == []
    assert table(results).splitlines()[2] == "| plain (0.500) | fold | 0.725 ± 0.025 | 0.562 | – |"
    write_results(results, tmp_path / "a.csv")
    assert list(read_results(tmp_path / "a.csv").values()) == results
