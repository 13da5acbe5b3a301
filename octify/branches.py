"""A source whose control flow depends on its input's size: a graph for each way through it, over one set of weights."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from octify.check import check_graph
from octify.errors import OctifyError, TraceError
from octify.flows import Flows
from octify.graph import get_attribute, map_leaves, meta_copy, tensors_of
from octify.module import OctaveModule
from octify.ops import same_branch_
from octify.plan import Plan, make_plan
from octify.recipe import Recipe
from octify.rewrite import rewrite_graph
from octify.trace import trace_model

Key = tuple[Any, ...]


def takes_branches(graph: fx.Graph) -> bool:
    """Whether a graph holds for some sizes only."""
    return any(node.target is same_branch_ for node in graph.nodes)


class Branches:
    """Finds the graph for inputs of a size: the converted module's own, or the source traced and rewritten again.

    The source is kept without its weights. Another graph has the plan's layouts, so that it runs on the converted
    module's own layers; what has no weights (adapters, pools) it brings along.
    """

    def __init__(self, flows: Flows, plan: Plan) -> None:
        self.source: nn.Module | None = meta_copy(flows.trace.model)
        self.example = flows.trace.inputs
        planned = _as_planned(flows, plan)
        self.recipes = (planned, planned.with_defaults(min_size=1))  # what lies between layers may be smaller now
        self.made: list[Branch] = []
        self.chosen: dict[Key, Branch | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Branches:
        return Branches.__new__(Branches)._fill(self._state())

    def _state(self) -> dict[str, Any]:
        return {"source": self.source, "example": self.example, "recipes": self.recipes}

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.source)
        except Exception:  # a class that pickle does not find again: the converted module does not need it
            return {**self._state(), "source": None}
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._fill(state)

    def _fill(self, state: dict[str, Any]) -> Branches:
        self.__dict__.update(state, made=[], chosen={})
        return self

    def graph_for(self, module: OctaveModule, inputs: tuple[Any, ...]) -> OctaveModule | None:
        """The module whose forward takes inputs of this size; None is `module` itself.

        Raises:
            TraceError: the source takes a way that the module's layers do not fit.
        """
        key = (module.training, *(tuple(value.shape) for value in inputs if isinstance(value, Tensor)))
        if key not in self.chosen:
            self.chosen[key] = self._choose(module, inputs)
        branch = self.chosen[key]
        return branch.over(module) if branch else None

    def _choose(self, module: OctaveModule, inputs: tuple[Any, ...]) -> Branch | None:
        if _passes(module, inputs):
            return None
        for branch in self.made:
            if _passes(branch.over(module), inputs):
                return branch
        failures: list[OctifyError] = []
        for recipe in self.recipes:
            try:
                branch = Branch(self._trace_again(inputs, recipe), module, self.source)
            except OctifyError as error:
                failures.append(error)
            else:
                self.made.append(branch)
                return branch
        shapes = ", ".join("x".join(map(str, value.shape)) for value in inputs if isinstance(value, Tensor))
        raise TraceError(
            f"an input of {shapes} takes the source through another branch than the example's, which does not fit "
            f"the plan: convert with example_inputs of this size.\n  {failures[0]}"
        ) from failures[0]

    def _trace_again(self, inputs: tuple[Any, ...], recipe: Recipe) -> OctaveModule:
        given = tuple(
            torch.empty(value.shape, dtype=like.dtype, device="meta") if isinstance(value, Tensor) else value
            for value, like in zip(inputs, self.example, strict=True)
        )
        if self.source is None:
            raise TraceError("the source's class cannot be pickled, so a pickle knows the example's branches only")
        flows = Flows(trace_model(self.source, given, ("guarded",)), recipe)
        plan = make_plan(flows)
        converted = rewrite_graph(flows, plan)
        check_graph(converted, flows, plan)
        return converted


class Branch:
    """A graph over another module's layers, and what it has of its own."""

    def __init__(self, made: OctaveModule, module: OctaveModule, source: nn.Module | None) -> None:
        self.made = made
        self.own: dict[str, nn.Module] = {}
        for graph in made.mode_graphs.values() if made.mode_graphs else (made.graph,):
            for node in graph.nodes:
                if node.op == "call_module":
                    node.target = self._place(str(node.target), module, source)
                elif node.op == "get_attr":
                    _check_attribute(str(node.target), made, module)
        made.recompile()

    def _place(self, path: str, module: OctaveModule, source: nn.Module | None) -> str:
        """Where a layer of the graph lies: in the module's tree, or, if octify made it and it is without weights, in a
        place of its own.
        """
        new, mine = self.made.get_submodule(path), _find(module, path)
        if mine is not None and _same(mine, new) and (_holds_tensors(new) or _find(source, path) is not None):
            return path
        if _holds_tensors(new):
            raise TraceError(f"{path} would be {new}, and is {mine}")
        name = f"octify_branch_{path.replace('.', '_')}"
        self.own[name] = new
        return name

    def over(self, module: OctaveModule) -> OctaveModule:
        """The graph, on the layers that the module has now and in its mode."""
        self.made.run_on(module, self.own)
        return self.made


def _as_planned(flows: Flows, plan: Plan) -> Recipe:
    """A recipe that gives every layer the layout that it has in a plan, whatever its map's size."""
    layers: list[dict[str, Any]] = []
    for op in plan.convolutions:
        pattern = {"match": "".join(f"[{sign}]" if sign in "*?[" else sign for sign in op.target)}
        settings = flows.settings[op.name]
        if not op.gives or op.form not in ("octave", "dense"):
            layers.append({**pattern, "keep": "dense"})
            continue
        said = {"layout": op.gives[0]} if op.form == "octave" else {"alpha": 0.0}
        same = {name: getattr(settings, name) for name in ("kernels", "downsample")}
        split = {"input": "split"} if settings.split_input else {}
        layers.append({**pattern, **said, **same, **split, "paths": list(settings.paths), "min_size": 1})
    data = flows.recipe.to_dict()
    return Recipe.from_dict({**data, "on_unsupported": "dense", "layers": [*layers, *data.get("layers", ())]})


@torch.no_grad()
def _passes(module: OctaveModule, inputs: tuple[Any, ...]) -> bool:
    """Whether a module's graph is the one for inputs of this size."""
    given = map_leaves(inputs, lambda value: value.to("meta") if isinstance(value, Tensor) else value)
    try:
        with _disable_current_modes():  # what counts or watches operations is not meant
            fx.Interpreter(meta_copy(module), graph=module.graph).run(*given)
    except TraceError:
        return False
    except Exception:  # the source's own refusal, which the real run repeats
        return True
    return True


def _find(root: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path) if root is not None else None
    except AttributeError:
        return None


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in tensors_of(module))


def _same(mine: nn.Module, new: nn.Module) -> bool:
    """Whether two layers compute the same with the same weights."""
    shapes = [[(tensor.shape) for tensor in tensors_of(layer)] for layer in (mine, new)]
    return type(mine) is type(new) and str(mine) == str(new) and shapes[0] == shapes[1]


def _check_attribute(path: str, made: OctaveModule, module: OctaveModule) -> None:
    """A tensor that a graph reads is the module's, unless the forward made it."""
    new = get_attribute(made, path)
    try:
        mine = get_attribute(module, path)
    except AttributeError:
        mine = None
    if new.is_meta and (mine is None or mine.shape != new.shape):
        raise TraceError(f"it reads {path}, which is not there")
    if not new.is_meta and mine is not None and not torch.equal(mine.cpu(), new):
        raise TraceError(f"its constant {path} is another")
