"""Everything that the census asks of one network."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from octify import load, save
from octify.convert import apply_plan, example_of
from octify.graph import meta_copy, sharing_copy
from octify.layers import Merge, Split
from octify.module import OctaveModule
from octify.oracles import ReplicatePadding
from octify.origin import origin_of, set_origin
from octify.plan import Flows, Plan, make_plan
from octify.recipe import Recipe
from octify.trace import trace_model
from octify.zoo import build_model, input_shape
from tests.zoo.constant import first_uneven, spread_gains
from tests.zoo.count import ALPHA, Counted, count, macs
from tests.zoo.detect import converted_parts, is_detector, shrink, targets
from tests.zoo.row import Row

REAL_LIMIT = 250e6  # parameters; four copies of more would not fit a worker's memory
TRAIN_LIMIT = 150e6
SMALL = (64, 96, 128, 160, 192)
CLOSE = 1e-4
Forward = Callable[[nn.Module], Any]


def measure(name: str, family: str = "") -> Row:
    """Fills a row; whatever fails says so in it."""
    library, short = name.split(":")
    row = Row(library, short, family)
    start = time.process_time()
    torch.manual_seed(0)
    try:
        with patch.object(torch, "batch_norm", _batch_norm):
            _Census(row, name).run()
    except Exception as error:
        row.say("census", brief(error))
    row.seconds = f"{time.process_time() - start:.1f}"
    return row


def _batch_norm(x: Tensor, *rest: Any) -> Tensor:
    """On meta tensors a shape is all that is asked, and torch's own way there takes a third of the census."""
    return torch.empty_like(x) if x.is_meta else _real_batch_norm(x, *rest)


_real_batch_norm = torch.batch_norm


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:3])}"


class _Census:
    """One network's way through the census."""

    def __init__(self, row: Row, name: str) -> None:
        self.row = row
        self.name = name
        self.recipe = Recipe.uniform(ALPHA)

    def run(self) -> None:
        """Meta tensors first: whether it is a CNN, and what it costs; then real ones."""
        ghost = build_model(self.name, device="meta").eval()
        self.shapes = input_shape(self.name)
        self.parameters = sum(parameter.numel() for parameter in ghost.parameters())
        self.row.parameters = str(self.parameters)
        self.detects = is_detector(ghost)
        if self.detects:
            self.counted = self._count_detector()
        else:
            example = example_of(ghost, None)
            self.counted = count(ghost, lambda: ghost(*example))
        share = self.backbone_share if self.detects else self.counted.share
        self.row.convolution_share = f"{share:.3f}"
        self.row.spatial_convolutions = str(self.counted.spatial)
        if not self.row.is_cnn:
            return
        real = self.parameters <= REAL_LIMIT
        self.ghost = ghost
        self.model = spread_gains(build_model(self.name)) if real else ghost
        self.source = sharing_copy(self.model).eval()
        if not real:
            self.row.say("oracles", f"not run, {self.parameters / 1e6:.0f} M parameters are more than a worker holds")
        if self.detects:
            self._detector()
        else:
            self._whole(real)

    # Networks that trace as a whole.

    def _whole(self, real: bool) -> None:
        row = self.row
        with self._step("convert"):
            example = tuple(torch.empty(2, *shape, device="meta") for shape in self.shapes)
            self.trace = trace_model(self.model, example)
            row.traced = self.trace.how
            self.decided = make_plan(flows := Flows(self.trace, self.recipe))
            self.converted = apply_plan(flows, self.decided)
            self.origin = origin_of(self.converted)
            row.converted = "yes" if self.decided.converted else "no"
            if not self.decided.converted:
                row.say("convert", f"nothing to convert: {_listed(self.decided.reasons())}")
        if not row.converted:
            return
        self._describe(self.decided)
        self.octave = meta_copy(self.converted).eval().requires_grad_(False)
        self._costs(self.octave)
        self._other_size(self.octave)
        if real:
            self._oracles()

    def _describe(self, decided: Plan) -> None:
        row = self.row
        row.parameters_octave = str(sum(parameter.numel() for parameter in self.converted.parameters()))
        graphs = [m.graph for m in self.converted.modules() if isinstance(m, OctaveModule)]
        kinds = [type(_called(self.converted, node)) for graph in graphs for node in graph.nodes]
        row.splits, row.merges = str(kinds.count(Split)), str(kinds.count(Merge))
        stems = [op.target for op in decided.ops if op.reason == "the first convolution on the image"]
        eligible = self.counted.eligible(stems)
        octave = {op.target for op in decided.ops if op.kind == "chooses" and op.form != "dense"}
        total = sum(call.macs for call in eligible)
        share = sum(call.macs for call in eligible if call.path in octave) / total if total else 1.0
        row.octave_share = f"{share:.3f}" if total else "-"
        row.opaque = _opaque(decided)
        self.saved = sum(call.macs * (1 - call.ratio) for call in eligible)
        if share < 0.9:
            left = {call.path: call.macs for call in eligible if call.path not in octave}
            row.say("share", _why_dense(decided, left))

    def _costs(self, ghost: nn.Module) -> None:
        row = self.row
        with self._step("run at default size"):
            example = example_of(self.ghost, None)
            after = macs(lambda: ghost(*example)) if self.trace.how != "fixed" else self._fixed_macs(ghost)
            row.runs_default = "yes"
            row.mac_ratio = f"{after / self.counted.weighted:.3f}"
            row.ideal_ratio = f"{1 - self.saved / self.counted.weighted:.3f}"
        row.runs_default = row.runs_default or "no"

    def _fixed_macs(self, ghost: nn.Module) -> float:
        """What was traced for a batch of two runs with that only."""
        return macs(lambda: ghost(*self.trace.inputs)) / 2

    def _other_size(self, ghost: nn.Module) -> None:
        """Two more sizes on meta tensors: an odd one and one of whole strides."""
        source = self.ghost.eval()
        done: list[str] = []
        for grow in ((45, 13), (32, 64)):
            inputs = [
                torch.empty(1, *shape[:-2], shape[-2] + grow[0], shape[-1] + grow[1], device="meta")
                for shape in self.shapes
            ]
            with torch.no_grad():
                if (wanted := _try(source, inputs)) is None:
                    continue
                try:
                    given = ghost(*inputs)
                    fits = [t.shape for t in _tensors(given)] == [t.shape for t in _tensors(wanted)]
                    done.append("yes" if fits else "no")
                except Exception as error:
                    done.append("no")
                    fixed = "" if self.trace.how == "symbolic" else f"{self.trace.how} trace: "
                    self.row.say("another size", fixed + brief(error))
        self.row.runs_other = "-" if not done else "no" if "no" in done else "yes"

    # Oracles on real tensors.

    def _oracles(self) -> None:
        image = self._small_image()
        if image is None:
            self.row.say("oracles", "the source runs on none of the sizes")
            return
        self._oracle1(lambda: apply_plan(flows := Flows(self.trace, Recipe.uniform(0.0)), make_plan(flows)), image)
        self._oracle2(image)
        self._save_load(image)
        if self.parameters > TRAIN_LIMIT:
            self.row.train_step = "-"
            return
        self._train_step(lambda model: model(*image))

    def _small_image(self) -> tuple[Tensor, ...] | None:
        """Random images of the smallest size at which the source runs; the traced size where that is fixed."""
        if self.trace.how not in ("symbolic", "guarded"):
            return tuple(torch.rand(2, *shape) for shape in self.shapes)
        for size in (*SMALL, 0):
            ends = (size, size) if size else self.shapes[0][-2:]
            image = tuple(torch.rand(2, *shape[:-2], *ends) for shape in self.shapes)
            ghosts = [value.to("meta") for value in image]
            nets = (self.ghost, self.octave) if self.trace.how == "guarded" else (self.ghost,)
            if all(_try(net.train(mode), ghosts) is not None for net in nets for mode in (True, False)):
                return image
        return None

    def _oracle1(self, make: Callable[[], nn.Module], image: tuple[Any, ...]) -> None:
        with self._step("oracle 1"):
            same = make().eval()
            source = self.source.eval()
            with torch.no_grad():
                equal = _equal(_run(source, image), _run(same, image))
            keys = list(same.state_dict()) == list(source.state_dict())
            self.row.oracle1 = "exact" if equal and keys else "no"
            if self.row.oracle1 == "no":
                self.row.say("oracle 1", "the output differs" if not equal else "the keys differ")
        self.row.oracle1 = self.row.oracle1 or "no"

    def _oracle2(self, image: tuple[Any, ...], part: str = "") -> None:
        with self._step("oracle 2"):
            flat = _flattened(image)
            source, converted = (model.eval().get_submodule(part) for model in (self.source, self.converted))
            error = _flat_error(source, converted, flat)
            if error >= CLOSE:  # rounding, or a fault?
                twice = [copy.deepcopy(m).double().eval() for m in (source, converted)]
                error = _flat_error(twice[0], twice[1], _map_tensors(flat, Tensor.double))
            self.row.oracle2 = f"{error:.1e}"
            if not error < CLOSE:
                where = first_uneven(source, *flat)
                why = f"{where} depends on position: its map of a constant image is uneven" if where else "a fault"
                self.row.say("oracle 2", why)
        self.row.oracle2 = self.row.oracle2 or "failed"

    def _train_step(self, forward: Forward) -> None:
        with self._step("train step"):
            wanted = _with_gradient(self.source.train(), forward)
            given = _with_gradient(self.converted.train(), forward)
            homes = {_home(name) for name in wanted}
            missing = [
                name for name, _ in self.converted.named_parameters() if name not in given and _home(name) in homes
            ]
            self.row.train_step = "no" if missing else "yes"
            if missing:
                self.row.say("train step", f"no gradient for {', '.join(missing[:4])} ({len(missing)} in all)")
        self.row.train_step = self.row.train_step or "no"

    def _save_load(self, image: tuple[Any, ...]) -> None:
        with self._step("save and load"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.safetensors"
            set_origin(self.converted, self.origin.named(self.name))
            save(self.converted.eval(), path)
            again = load(path).eval()
            with torch.no_grad():
                self.row.save_load = "equal" if _equal(_run(self.converted, image), _run(again, image)) else "differs"
        self.row.save_load = self.row.save_load or "failed"

    # Detectors: a real run at a small size.

    def _count_detector(self) -> Counted:
        model = shrink(build_model(self.name)).eval()
        self.image = ([torch.rand(3, *model.transform.fixed_size) for _ in range(2)],)
        ghost = meta_copy(model.backbone)
        # Its heads are Linear layers on a thousand boxes: what counts is the network that sees the image.
        self.backbone_share = count(ghost, lambda: ghost(self.image[0][0][None].to("meta"))).share
        return count(model, lambda: model([self.image[0][0]]))

    def _detector(self) -> None:
        row = self.row
        shrink(self.model)
        with self._step("convert"):
            example = (self.image[0][0].to("meta")[None],)
            self.converted, self.decided = converted_parts(self.model, self.recipe, example)
            self.origin = origin_of(self.converted)
            row.converted, row.traced = "yes" if self.decided.converted else "no", self.decided.how
        if not row.converted:
            return
        self._describe(self.decided)
        with self._step("run at default size"):
            images = self.image[0][:1]
            before, after = (macs(lambda m=m: m.eval()(images)) for m in (self.model, self.converted))
            row.runs_default = "yes"
            row.mac_ratio, row.ideal_ratio = f"{after / before:.3f}", f"{1 - self.saved / before:.3f}"
        with self._step("another size"):
            with torch.no_grad():
                self.converted.eval()([torch.rand(3, 301, 277)])
            row.runs_other = "yes"
        self._oracle1(lambda: converted_parts(self.model, Recipe.uniform(0.0), example)[0], self.image)
        self._oracle2((torch.stack(self.image[0]),), "backbone")  # boxes of random weights say little
        self._save_load(self.image)
        self._train_step(lambda model: model(*self.image, targets(self.model, self.image[0])))

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.row.say(name, brief(error))


def _called(model: nn.Module, node: Any) -> nn.Module | None:
    """The adapter that a node calls; adapters live at the top of the part whose graph has the node."""
    if node.op != "call_module" or "octify_" not in str(node.target):
        return None
    owner = node.graph.owning_module or model
    return owner.get_submodule(str(node.target))


def _opaque(decided: Plan) -> str:
    """What stays dense between a merge and a split although maps flow through it."""
    found = {
        op.target if op.type in ("function", "method") else op.type
        for op in decided.ops
        if op.kind == "opaque" and op.reads
    }
    return " ".join(sorted(found))


def _why_dense(decided: Plan, left: dict[str, int]) -> str:
    reasons: dict[str, int] = {}
    known = {op.target: op.reason or "keeps its layout" for op in decided.ops}
    known |= {op.target: "reads tokens, not a map" for op in decided.ops if op.kind == "plain"}
    for path, cost in left.items():
        why = known.get(path, "inside an opaque operation or an untraced part")
        reasons[why] = reasons.get(why, 0) + cost
    total = sum(left.values())
    return ", ".join(f"{why} ({cost / total:.0%})" for why, cost in sorted(reasons.items(), key=lambda i: -i[1])[:3])


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{why} ({times})" for why, times in list(reasons.items())[:3])


def _try(model: nn.Module, inputs: Any) -> Any:
    try:
        return model(*inputs)
    except Exception:
        return None


def _run(model: nn.Module, image: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    return model(*image)


def _tensors(tree: Any) -> list[Tensor]:
    leaves: list[Any] = torch.utils._pytree.tree_leaves(tree)
    if len(leaves) == 1 and not isinstance(leaves[0], Tensor) and hasattr(leaves[0], "__dict__"):
        leaves = list(vars(leaves[0]).values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, change, tree)


def _equal(first: Any, second: Any) -> bool:
    a, b = _tensors(first), _tensors(second)
    return len(a) == len(b) > 0 and all(
        torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in zip(a, b, strict=True)
    )


def _flattened(image: tuple[Any, ...]) -> tuple[Any, ...]:
    """Images of one colour each."""
    return _map_tensors(image, lambda x: x.flatten(-2)[..., :1, None].expand_as(x).contiguous())


def _flat_error(model: nn.Module, converted: nn.Module, flat: tuple[Any, ...]) -> float:
    """The largest difference relative to the largest value, over all outputs."""
    with torch.no_grad(), ReplicatePadding():
        wanted, given = (_tensors(_run(m, flat)) for m in (model, converted))
    if [t.shape for t in wanted] != [t.shape for t in given]:
        return float("inf")
    errors = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))
        for a, b in zip(wanted, given, strict=True)
        if a.numel() and a.is_floating_point()
    ]
    return max(errors, default=0.0)


def _with_gradient(model: nn.Module, forward: Forward) -> set[str]:
    """The parameters that a train step gives a finite gradient."""
    model.zero_grad()
    values = [value for value in _tensors(forward(model)) if value.is_floating_point()]
    total = sum((value.square().mean() for value in values), start=torch.zeros(()))
    total.backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _home(name: str) -> str:
    """The source module of a parameter."""
    path = name.rpartition(".")[0]
    return path.removesuffix(".high").removesuffix(".low")
