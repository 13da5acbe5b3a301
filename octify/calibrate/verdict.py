"""How much of a network a converted one keeps, on images: decisions, probabilities, and every layer's bands."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octify.calibrate.data import Batches, float_tensors, output_loss, take_batches
from octify.calibrate.layer_errors import LayerError, layer_errors
from octify.errors import CalibrationError
from octify.graph import sharing_copy
from octify.module import OctaveModule

LAYER_BATCHES, LAYER_IMAGES = 4, 16  # by so many images of so many batches layers are compared


@dataclass(frozen=True)
class Verdict:
    """A converted network beside its source on the same images.

    `kind` is what the outputs are: "classes" (rows of logits), "pixels" (maps of logits) or "features". Decisions,
    `kl` (mean, nats) and `cosine` are None where they mean nothing; `loss` is the outputs' squared error as a share of
    their variance. `top1` and `top5` hold (dense, octave) where labels are known.
    """

    images: int
    kind: str
    loss: float
    cosine: float
    agreement: float | None = None
    kl: float | None = None
    top1: tuple[float, float] | None = None
    top5: tuple[float, float] | None = None
    layers: list[LayerError] = field(default_factory=list[LayerError])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def compare(
    source: nn.Module,
    converted: nn.Module,
    batches: Batches,
    labels: Tensor | None = None,
    samples: int | None = None,
    *,
    kind: str | None = None,
) -> Verdict:
    """Measures a converted network against its source; both run in eval mode and are left as they were.

    `batches` is a tensor, or gives tensors or tuples of the model's inputs; `labels` (N,) belong to them in order.
    `kind` says what the outputs are where their shape would mislead.

    Raises:
        CalibrationError: no images, or another number of labels.
    """
    dense, octave = sharing_copy(source).eval(), sharing_copy(converted).eval()
    given = [batch if isinstance(batch, tuple) else (batch,) for batch in take_batches(batches, samples)]
    if not given:
        raise CalibrationError("there are no images to compare on")
    with torch.no_grad():
        pairs = [(dense(*inputs), octave(*inputs)) for inputs in given]
    wanted, kept = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    first = [torch.cat(column) for column in zip(*pairs_of(wanted, kept), strict=True)]
    if not first:
        raise CalibrationError("the model gives no floating-point tensor: there is nothing to compare")
    y, x = first
    decides = is_decision(y) and kind != "features"
    scores = labels is not None and y.dim() == 2
    if scores and len(cast(Tensor, labels)) < len(y):
        raise CalibrationError(f"{len(cast(Tensor, labels))} labels for {len(y)} images")
    return Verdict(
        images=sum(len(inputs[0]) for inputs in given),
        kind="features" if not decides else "classes" if y.dim() == 2 else "pixels",
        loss=output_loss(wanted, kept),
        cosine=float(F.cosine_similarity(x.flatten(1), y.flatten(1), dim=1).mean()),
        agreement=agreement(wanted, kept) if decides else None,
        kl=_divergence(y, x) if decides else None,
        top1=_top(y, x, cast(Tensor, labels), 1) if scores else None,
        top5=_top(y, x, cast(Tensor, labels), 5) if scores and y.shape[1] > 5 else None,
        layers=_layers(dense, octave, given),
    )


def _layers(dense: nn.Module, octave: nn.Module, given: Sequence[tuple[Tensor, ...]]) -> list[LayerError]:
    """Of some images; none of a module that is not octave as a whole, or whose source does not trace with these."""
    if not isinstance(octave, OctaveModule):
        return []
    chunks = [tuple(value[:LAYER_IMAGES] for value in inputs) for inputs in given[:LAYER_BATCHES]]
    return layer_errors(dense, octave, chunks)


def agreement(dense: Sequence[Any], octave: Sequence[Any]) -> float | None:
    """The share of equal decisions, the largest class of each row of logits or pixel; None if there is none."""
    decided = [(d.argmax(1) == o.argmax(1)).double() for d, o in pairs_of(dense, octave) if is_decision(d)]
    return float(torch.cat([same.reshape(-1) for same in decided]).mean()) if decided else None


def pairs_of(dense: Sequence[Any], octave: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """The first floating-point tensor of each chunk's outputs, dense and octave."""
    firsts = [(float_tensors(d)[:1], float_tensors(o)[:1]) for d, o in zip(dense, octave, strict=True)]
    return [(d[0], o[0]) for d, o in firsts if d and o]


def is_decision(output: Tensor) -> bool:
    """Whether the largest entry along axis 1 is a class: rows of logits, or maps of them."""
    return output.dim() in (2, 4) and output.shape[1] > 1


def _divergence(dense: Tensor, octave: Tensor) -> float:
    logs = [F.log_softmax(output.double(), 1) for output in (octave, dense)]
    return float(F.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(1).mean())


def _top(dense: Tensor, octave: Tensor, labels: Tensor, count: int) -> tuple[float, float]:
    wanted = labels[: len(dense)].to(dense.device)[:, None]
    shares = [float((output.topk(count, 1).indices == wanted).any(1).double().mean()) for output in (dense, octave)]
    return shares[0], shares[1]


def labels_of(batches: Iterable[Any]) -> Tensor | None:
    """The labels in (images, labels) batches, if every batch has them."""
    found = [batch[1] for batch in batches if isinstance(batch, (tuple, list)) and len(batch) == 2]  # pyright: ignore
    whole = [label for label in found if isinstance(label, Tensor) and label.dim() == 1]
    return torch.cat(whole) if whole and len(whole) == len(found) else None
