"""CompConv in thirty nets of the census: convert, run at an odd size, train a step, save, load, export.

`make compconv`, or `python -m tests.compconv_nets resnet18 timm:darknet53`. One line a net; exit 1 if one fails.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octify import convert, load, plan_of, save
from octify.export import export
from octify.zoo import build_model, input_shape

SPATIAL = (
    "resnet18 resnet50 wide_resnet50_2 vgg11_bn vgg16 alexnet squeezenet1_1 densenet121 googlenet inception_v3 "
    "fcn_resnet50 deeplabv3_resnet50 r3d_18 timm:resnet26d timm:seresnet50 timm:vovnet39a timm:hrnet_w18_small "
    "timm:dla34 timm:darknet53 timm:cspresnet50 timm:cspdarknet53 timm:res2net50_26w_4s timm:repvgg_a0 "
    "timm:resnetv2_50"
)
# All but their stems is grouped or 1x1.
POINTWISE = "mobilenet_v2 mnasnet0_5 shufflenet_v2_x1_0 resnext50_32x4d timm:efficientnet_b0 timm:regnety_002"
NETS = {**dict.fromkeys(SPATIAL.split(), "spatial"), **dict.fromkeys(POINTWISE.split(), "all")}
SIDES = (64, 96, 128, 224, 299)


def examine(name: str, *, exports: bool = True, folder: Path) -> str:
    """Takes a net through everything and says what it did.

    Raises:
        AssertionError: something is not as in the source.
    """
    torch.manual_seed(0)
    source = build_model(name).eval()
    converted = convert(source, operator="compconv", kernels=NETS.get(name, "spatial")).eval()
    changed = plan_of(converted).converted
    assert changed and all(op.form == "compconv" for op in changed), name
    odd = images_for(source, name, (5, 17))
    with torch.no_grad():
        wanted, given = tensors(source(*odd)), tensors(converted(*odd))
    assert [value.shape for value in given] == [value.shape for value in wanted], name
    assert all(value.isfinite().all() for value in given), name
    file = folder / f"{name.replace(':', '_')}.safetensors"
    save(converted, file)
    again = load(file)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(given, tensors(again(*odd)), strict=True)), name
    file.unlink()
    said = ""
    if exports:
        example = images_for(source, name, (0, 0))
        written = export(again, folder / "net.pt2", example_inputs=example, overwrite=True)
        said = f", pt2 with open {' and '.join(written.dynamic) or 'nothing'}, error {written.error:.0e}"
    train_step(source, converted, images_for(source, name, (0, 0), batch=2, training=True))
    size = "x".join(map(str, odd[0].shape[1:]))
    return f"{len(changed)} of {len(plan_of(converted).convolutions)} convolutions, runs at {size}{said}"


def images_for(
    model: nn.Module, name: str, more: tuple[int, int], batch: int = 1, training: bool = False
) -> tuple[Tensor, ...]:
    """Random images of the smallest side that the source takes, a little more along each axis."""
    shape = input_shape(name)[0]
    model.train(training)
    for side in (*SIDES, None):
        ends = shape[-2:] if side is None else (side + more[0], side + more[1])
        image = torch.rand(batch, *shape[:-2], *ends)
        try:
            with torch.no_grad():
                model(image)
        except (RuntimeError, ValueError, AssertionError):
            continue
        return (image,)
    raise AssertionError(f"{name} runs on no size")


def train_step(source: nn.Module, converted: nn.Module, images: Sequence[Tensor]) -> None:
    """Every parameter gets a finite gradient if its module's does in the source, and a step keeps the output finite."""
    reached = {name.rpartition(".")[0] for name in gradients(source.train(), images)}
    found = gradients(converted.train(), images)
    for name, parameter in converted.named_parameters():
        home = name.partition(".units.")[0].partition(".tail.")[0]
        if home in reached or home.rpartition(".")[0] in reached:
            assert name in found, name
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    torch.optim.SGD(converted.parameters(), 1e-3).step()
    with torch.no_grad():
        assert all(value.isfinite().all() for value in tensors(converted(*images)))


def gradients(model: nn.Module, images: Sequence[Tensor]) -> set[str]:
    """The parameters that a backward pass reaches."""
    loss: Any = sum(value.square().mean() for value in tensors(model(*images)))
    loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output; what torchvision wraps in classes too."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def main() -> None:
    """A line a net."""
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or NETS:
            start = time.perf_counter()
            try:
                said = examine(name, folder=Path(folder))
            except Exception as error:
                failed += 1
                said = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
            print(f"{name:24} {said}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(sys.argv[1:] or NETS) - failed} nets pass, {failed} fail")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
