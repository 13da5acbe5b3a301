"""A converted network is a module like any other: copies, pickles, hooks, compile, export, DDP, the same bytes."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.export import export
from torch.nn.parallel import DistributedDataParallel

import octify
from octify.errors import ModelError
from octify.verify import shake
from octify.zoo import build_model

SHAPE = (2, 3, 64, 64)
NAMES = ["timm:resnet10t", "shufflenet_v2_x0_5", "googlenet"]


def converted(name: str) -> nn.Module:
    return octify.convert(build_model(name), alpha=0.5)


def same(first: nn.Module, second: nn.Module) -> bool:
    image = torch.randn(SHAPE)
    with torch.no_grad():
        return torch.equal(first.eval()(image), second.eval()(image))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_equal_and_independent(name: str) -> None:
    model = converted(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert same(model, other)
        assert octify.plan_of(other) == octify.plan_of(model)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not same(model, other)


def test_both_modes_survive_a_copy() -> None:
    model = copy.deepcopy(converted("googlenet"))
    image = torch.randn(2, 3, 96, 96)
    assert isinstance(model.eval()(image), Tensor)
    assert type(model.train()(image)).__name__ == "GoogLeNetOutputs"


def test_hooks_fire_on_the_source_names() -> None:
    model = converted("timm:resnet10t").eval()
    seen: dict[str, object] = {}
    for name in ("layer1.0.conv1", "layer1.0", "fc"):
        model.get_submodule(name)
    model.layer1[0].conv1.register_forward_hook(lambda module, args, output: seen.update(conv=output))
    model.fc.register_forward_pre_hook(lambda module, args: seen.update(fc=args[0]))
    model.register_forward_hook(lambda module, args, output: seen.update(whole=output))
    model(torch.randn(SHAPE))
    high, low = seen["conv"]
    assert high.shape[-1] == 2 * low.shape[-1]
    assert seen["fc"].shape == (2, 512)
    assert seen["whole"].shape == (2, 1000)


def test_attributes_modes_and_flags_are_kept() -> None:
    source = build_model("timm:resnet10t").to(memory_format=torch.channels_last).eval()
    source.layer1[0].conv1.requires_grad_(False)
    source.layer1[0].bn1.train()
    model = octify.convert(source, alpha=0.5)
    assert model.pretrained_cfg == source.pretrained_cfg
    assert model.num_classes == source.num_classes == 1000
    assert not model.training
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("layer1.0.conv1.")}
    assert len(frozen) > 1
    assert model.layer1[0].bn1.low.training
    weight = model.layer1[0].conv1.weight_hh
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_gives_the_same() -> None:
    model = converted("timm:resnet10t").eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    image = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)


def test_export_with_a_free_batch_gives_the_same() -> None:
    model = converted("timm:resnet10t").eval()
    batch = torch.export.Dim("batch", min=1, max=16)
    program = export(model, (torch.randn(SHAPE),), dynamic_shapes=({0: batch},))
    image = torch.randn(5, *SHAPE[1:])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


def test_ddp_takes_a_training_step(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(octify.convert(shake(build_model("timm:resnet10t")), alpha=0.5).train())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = [tensor.clone() for tensor in model.parameters()]
        model(torch.randn(SHAPE)).square().mean().backward()
        optimizer.step()
        changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
        assert all(changed)
    finally:
        dist.destroy_process_group()


def test_the_same_call_gives_the_same_bytes() -> None:
    first, second = (converted("shufflenet_v2_x0_5") for _ in range(2))
    assert first.code == second.code
    assert str(octify.plan_of(first)) == str(octify.plan_of(second))
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_the_source_is_untouched() -> None:
    source = build_model("shufflenet_v2_x0_5").eval()
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in source.state_dict().items()}
    keys = {name: set(vars(module)) for name, module in source.named_modules()}
    model = octify.convert(source, alpha=0.5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert {name: set(vars(module)) for name, module in source.named_modules()} == keys
    for name, tensor in source.state_dict().items():
        assert tensor.data_ptr() == state[name][0]
        assert torch.equal(tensor, state[name][1])


def test_meta_models_plan_and_convert_without_memory() -> None:
    model = build_model("resnet50", device="meta")
    plan = octify.plan(model, alpha=0.25)
    converted = octify.convert(model, alpha=0.25)
    assert plan == octify.plan_of(converted)
    assert all(tensor.is_meta for tensor in converted.state_dict().values())


def test_more_inputs_than_the_network_takes_are_refused() -> None:
    one = torch.randn(1, 3, 32, 32)
    for work in (octify.convert, octify.plan):
        with pytest.raises(ModelError, match=r"ResNet takes 1 input\(s\): example_inputs holds 2"):
            work(build_model("timm:resnet10t"), example_inputs=(one, one))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_are_kept() -> None:
    source = build_model("timm:resnet10t").cuda().half()
    model = octify.convert(source, alpha=0.5)
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("cuda", torch.float16)}
    assert model.eval()(torch.randn(SHAPE, device="cuda", dtype=torch.float16)).isfinite().all()


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "recipe", "alpha"),
    [
        ("resnet18", "uniform", 0.25),
        ("resnet18", "resnet", 0.5),
        ("mobilenet_v2", "uniform", 0.25),
        ("shufflenet_v2_x0_5", "uniform", 0.5),
        ("squeezenet1_1", "uniform", 0.125),
        ("timm:cspresnet50", "resnet", 0.25),
    ],
)
def test_plans_are_as_they_were(name: str, recipe: str, alpha: float) -> None:
    """A plan's text changes only on purpose: OCTIFY_GOLDEN=1 writes it anew."""
    path = GOLDEN / f"{name.replace(':', '_')}-{recipe}-{alpha}.txt"
    text = str(octify.plan(build_model(name, device="meta"), recipe=recipe, alpha=alpha)) + "\n"
    if os.environ.get("OCTIFY_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "if this is meant: OCTIFY_GOLDEN=1 pytest tests/test_module.py"
