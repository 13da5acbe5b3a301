"""What the commands do, from a network's name to a tree of plain values that prints and goes into JSON."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from octify.check import Check
from octify.checkpoint import Header, build_source, check_target, load, read_checkpoint, save
from octify.conversion import Conversion
from octify.convert import choose_recipe
from octify.cost import Cost, model_cost, source_cost
from octify.errors import ModelError, TraceError
from octify.layers import Merge, Split
from octify.operators import list_operators, transfer_notes
from octify.origin import origin_of, set_origin
from octify.plan import Plan
from octify.recipe import Recipe
from octify.rules.base import FUNCTIONS, METHODS, MODULES, Rule
from octify.trace import SIZED
from octify.verify import all_checks, quick_checks
from octify.zoo import build_model, input_shape, resolve

Step = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a user asks for on the command line.

    `input_size` is one image's shape; `source` names the network of a checkpoint that was made from a user's own.
    """

    model: str
    alpha: float | None = None
    recipe: str | None = None
    kernels: str | None = None
    input_size: tuple[int, ...] | None = None
    pretrained: bool = False
    weights: Path | None = None
    seed: int = 0
    operator: str | None = None
    c0: int | None = None
    source: str | None = None

    @property
    def weights_are_random(self) -> bool:
        """Whether nobody trained them: a library's network without weights; a user's factory may load some."""
        untold = not self.pretrained and self.weights is None
        return untold and resolve(self.model).library in ("torchvision", "timm")

    def choose(self) -> Recipe:
        """The recipe.

        Raises:
            RecipeError: there is none, or it is no recipe.
        """
        return choose_recipe(self.recipe, self.alpha, self.kernels, self.operator, self.c0)

    def build(self, device: str = "cpu") -> nn.Module:
        """The source network, its weights too unless it is on meta.

        Raises:
            ModelError: there is no such network, or its weights cannot be had.
        """
        if is_checkpoint(self.model):
            raise ModelError(f"{self.model} is converted already: name its source to convert it in another way")
        real = device != "meta"
        weights = self.weights if real else None
        return build_model(
            self.model, pretrained=self.pretrained and real, weights=weights, seed=self.seed, device=device
        )

    def read(self, device: str = "cpu") -> Conversion:
        """The source, traced.

        Raises:
            RecipeError, ModelError, TraceError: as `octify.convert`.
        """
        recipe = self.choose()
        model = self.build(device)
        sizes = (self.input_size,) if self.input_size else input_shape(resolve(self.model))
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        example = tuple(torch.empty(1, *size, device="meta", dtype=dtype) for size in sizes)
        if device == "meta":
            with contextlib.suppress(TraceError):
                reading = Conversion.read(model, recipe, example)
                if reading.flows.trace.how in SIZED:
                    return reading
            model = self.build()  # finding the parts of a model takes a run
        return Conversion.read(model, recipe, example)


def is_checkpoint(text: str) -> bool:
    """Whether a command's argument is a file rather than a network's name."""
    return text.endswith(".safetensors")


def convert_model(request: Request, output: Path | None, overwrite: bool, step: Step) -> dict[str, Any]:
    """Converts, checks, and writes a checkpoint if there is an output.

    Raises:
        OctifyError: whatever is wrong; nothing is written then.
    """
    start = time.perf_counter()
    if output is not None:
        check_target(output, overwrite)
    step(f"building and tracing {request.model}")
    reading = request.read()
    step("converting")
    converted = reading.run()
    name_source(converted, request.model)
    step("checking")
    checks = quick_checks(reading, converted)
    step("counting")
    facts = describe(reading, converted.octify_plan, converted, request)  # pyright: ignore[reportArgumentType]
    if output is not None:
        step(f"writing {output}")
        save(converted, output, overwrite)
    seconds = round(time.perf_counter() - start, 2)
    return {**facts, "checks": [asdict(c) for c in checks], "seconds": seconds, "output": output and str(output)}


def name_source(converted: nn.Module, name: str) -> None:
    """Gives a converted model its source's full name."""
    origin = origin_of(converted)
    if origin is not None:
        set_origin(converted, origin.named(str(resolve(name))))


def plan_model(request: Request, step: Step) -> tuple[dict[str, Any], Plan, Conversion]:
    """Decides, on the meta device: the facts, the plan, and what it was read from.

    Raises:
        OctifyError: whatever is wrong.
    """
    start = time.perf_counter()
    step(f"tracing {request.model}")
    source = None
    if is_checkpoint(request.model):
        reading, plan, source = _read_stored(request)
    else:
        reading = request.read("meta")
        step("planning")
        plan = reading.plan()
    facts = describe(reading, plan, reading.apply(plan), request, source)
    facts["seconds"] = round(time.perf_counter() - start, 2)
    facts["operations"] = plan.to_dict()["ops"]
    return facts, plan, reading


def _read_stored(request: Request) -> tuple[Conversion, Plan, str | None]:
    """What a checkpoint was made from, its plan, and the source's name."""
    if request != Request(request.model, source=request.source):
        raise ModelError(f"{request.model} has its own plan: leave out --alpha, --recipe, --kernels and the like")
    header, _ = read_checkpoint(request.model)
    device = "cpu" if header.plan.how == "parts" else "meta"  # finding parts takes a run
    source = build_source(header, Path(request.model), device, request.source)
    return Conversion.read(source, header.recipe, header.origin.example()), header.plan, header.origin.source


def describe(
    reading: Conversion, plan: Plan, converted: nn.Module, request: Request, source: str | None = None
) -> dict[str, Any]:
    """The facts about a conversion; `source` is the network's full name where the request names a checkpoint."""
    shapes = [list(value.shape[1:]) for value in reading.example if isinstance(value, Tensor)]
    before, after = costs_of(reading, converted)
    return {
        "model": request.model,
        "source": source or str(resolve(request.model)),
        "input_size": shapes[0] if len(shapes) == 1 else shapes,
        "alpha": reading.recipe.alpha,
        "recipe": request.recipe or reading.recipe.name,
        **({"transfer": lost} if (lost := transfer_notes(op.form for op in plan.ops)) else {}),
        "convolutions": count_convolutions(plan),
        "adapters": count_adapters(reading, converted),
        "parameters": {"before": before.parameters, "after": after.parameters},
        "gmacs": _compare(before.gmacs, after.gmacs),
        "activation_mib": _compare(before.activation_mib, after.activation_mib),
    }


def count_convolutions(plan: Plan) -> dict[str, Any]:
    """How many convolutions there are, how many change, and why the others do not."""
    total, changed = len(plan.convolutions), len(plan.converted)
    forms = Counter(op.form for op in plan.converted)
    counts = {"total": total, "octave": forms["octave"], "dense": total - changed}
    mixed = {} if set(forms) <= {"octave"} else {"operators": dict(forms)}
    return {**counts, **mixed, "reasons": plan.reasons()}


def count_adapters(reading: Conversion, converted: nn.Module) -> dict[str, int]:
    """How many splits and merges the converted graphs call."""
    found = {"split": 0, "merge": 0}
    for _, module in reading.pairs(converted):
        for node in module.graph.nodes:
            kind = _adapter_kind(module, node)
            if kind:
                found[kind] += 1
    return found


def _adapter_kind(module: nn.Module, node: fx.Node) -> str:
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return "split" if isinstance(called, Split) else "merge" if isinstance(called, Merge) else ""


def costs_of(reading: Conversion, converted: nn.Module) -> tuple[Cost, Cost]:
    """The costs of source and converted model; of a model converted in parts, the parts' alone but all parameters."""
    pairs = reading.pairs(converted)
    before = [source_cost(flows.trace) for flows, _ in pairs]
    after = [model_cost(module, flows.trace.inputs) for flows, module in pairs]
    return _total(before, reading.model), _total(after, converted)


def _total(costs: Sequence[Cost], model: nn.Module) -> Cost:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, sum(cost.gmacs for cost in costs), sum(cost.activation_mib for cost in costs))


def _compare(before: float, after: float) -> dict[str, float]:
    ratio = after / before if before else 1.0
    return {"before": round(before, 4), "after": round(after, 4), "ratio": round(ratio, 4)}


def open_checkpoint(path: str, source: str | None) -> tuple[Header, nn.Module, nn.Module]:
    """A checkpoint's header, its source network (with other weights), and the converted one.

    Raises:
        OctifyError: the file is none or cannot be loaded, or its source cannot be built.
    """
    header, _ = read_checkpoint(path)
    model = build_source(header, Path(path), source=source)
    return header, model, load(path, model)


def verify_target(request: Request, step: Step) -> list[Check]:
    """All checks of a model's conversion, or of a checkpoint's.

    Raises:
        OctifyError: whatever keeps the checks from being run.
    """
    if not is_checkpoint(request.model):
        step(f"building and tracing {request.model}")
        reading = request.read()
        step("checking")
        return all_checks(reading)
    step("building the source")
    header, model, loaded = open_checkpoint(request.model, request.source)
    reading = Conversion.read(model.to(next(loaded.parameters()).dtype), header.recipe, header.origin.example())
    step("checking")
    tensors = len(loaded.state_dict())
    return [Check("the file is whole and loads", True, f"{tensors} tensors"), *all_checks(reading, header.plan)]


def inspect_file(path: Path) -> dict[str, Any]:
    """What a checkpoint holds.

    Raises:
        CheckpointError: it is none of octify's, or damaged.
    """
    header, tensors = read_checkpoint(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "made_by": header.made_by,
        "source": header.origin.source,
        "class": header.origin.kind,
        "input_size": [list(shape) for shape, _ in header.origin.inputs],
        "dtype": header.dtype,
        "alpha": header.recipe.alpha,
        "recipe": header.recipe.to_dict(),
        "convolutions": count_convolutions(header.plan),
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
        "operations": header.plan.to_dict()["ops"],
    }


def list_rules() -> list[dict[str, str]]:
    """The operations with a rule: what it is for, its kind, and what it says of itself."""
    found = [(_type_name(key), rule) for key, rule in MODULES.items()]
    found += [(f"function {_type_name(key)}", rule) for key, rule in FUNCTIONS.items()]
    found += [(f"method {key}", rule) for key, rule in METHODS.items()]
    return [
        {"operation": name, "kind": rule.kind, "rule": type(rule).__name__, "does": _first_line(rule)}
        for name, rule in sorted(found, key=lambda pair: pair[0])
    ]


def list_named_operators() -> list[dict[str, str]]:
    """What a recipe may name as a layer's operator."""
    return [
        {"operator": operator.name, "options": ", ".join(operator.takes), "does": operator.summary}
        for operator in list_operators()
    ]


def _type_name(key: Any) -> str:
    return str(getattr(key, "__name__", key))


def _first_line(rule: Rule) -> str:
    return (type(rule).__doc__ or "").strip().partition("\n")[0]
