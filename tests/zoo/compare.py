"""Running two networks on the same images, and what their outputs and gradients have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octify.oracles import ReplicatePadding

Forward = Callable[[nn.Module], Any]
NUDGE = 6e-8  # what single precision rounds to; some norms compute in it whatever they are given


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:3])}"


def try_run(model: nn.Module, inputs: Sequence[Any]) -> Any:
    """What a model gives, or None where it refuses the inputs."""
    try:
        return model(*inputs)
    except Exception:
        return None


def run(model: nn.Module, image: Sequence[Any]) -> Any:
    """What a model gives, always with the same random numbers."""
    torch.manual_seed(0)
    return model(*image)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of an output, whatever it is made of."""
    leaves: list[Any] = torch.utils._pytree.tree_leaves(tree)
    if len(leaves) == 1 and not isinstance(leaves[0], Tensor) and hasattr(leaves[0], "__dict__"):
        leaves = list(vars(leaves[0]).values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with other tensors."""
    return torch.utils._pytree.tree_map_only(Tensor, change, tree)


def equal(first: Any, second: Any) -> bool:
    """Whether two outputs hold the same numbers, bit for bit."""
    a, b = tensors(first), tensors(second)
    return len(a) == len(b) > 0 and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True)
    )


def flattened(image: Any) -> Any:
    """Images of one colour each."""
    return map_tensors(image, lambda x: x.flatten(-2)[..., :1, None].expand_as(x).contiguous())


@torch.no_grad()
def part_inputs(model: nn.Module, paths: Sequence[str], flat: Any) -> dict[str, Any]:
    """What some parts of a model are given first, each map of it in one colour a channel; the whole has the path ""."""
    found: dict[str, Any] = {}

    def keep(path: str) -> Any:
        return lambda _, args: found.setdefault(path, args)

    handles = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths if path]
    if handles:
        model.eval()(*flat)
    for handle in handles:
        handle.remove()
    return {path: flattened(found[path]) if path else flat for path in paths}


def recoloured(seed: int) -> Callable[[Tensor], Tensor]:
    """Gives images of one colour another, in double precision; seed 0 leaves them as they are."""
    generator = torch.Generator().manual_seed(seed)

    def change(x: Tensor) -> Tensor:
        shift = torch.rand(*x.shape[:2], *(1,) * (x.dim() - 2), generator=generator, dtype=torch.float64)
        return x.double() + shift * bool(seed)

    return change


@torch.no_grad()
def flat_error(model: nn.Module, converted: nn.Module, flat: Sequence[Any]) -> float:
    """The largest difference relative to the largest value, over all outputs."""
    with ReplicatePadding():
        wanted, given = (tensors(run(m, flat)) for m in (model, converted))
    if [t.shape for t in wanted] != [t.shape for t in given]:
        return float("inf")
    errors = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(wanted, given, strict=True)
        if a.numel() and a.is_floating_point()
    ]
    return max(errors, default=0.0)


@torch.no_grad()
def sensitivity(model: nn.Module, flat: Any) -> float:
    """How far a model's output moves, as `flat_error` has it, when its constant images do by up to `NUDGE`.

    By another amount at each pixel, as rounding does: norms that divide by the spread of a map feel that most.
    """
    dice = torch.Generator().manual_seed(0)

    def nudged(x: Any) -> Any:
        return x * (1 + NUDGE * torch.rand(x.shape, generator=dice, dtype=x.dtype))

    with ReplicatePadding():
        before, after = (tensors(run(model, image)) for image in (flat, map_tensors(flat, nudged)))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True) if a.numel())


def with_gradient(model: nn.Module, forward: Forward) -> set[str]:
    """The parameters that a train step gives a gradient."""
    model.zero_grad()
    values = [value for value in tensors(forward(model)) if value.is_floating_point()]
    torch.stack([value.square().mean().float() for value in values]).sum().backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def home(name: str) -> str:
    """The source module of a parameter."""
    path = name.rpartition(".")[0]
    return path.removesuffix(".high").removesuffix(".low")
