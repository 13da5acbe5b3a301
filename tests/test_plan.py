"""What a plan must get right: tied channels, bundles, balance, borders, both modes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import octify
from octify.convert import choose_recipe, read_flows
from octify.errors import ConversionError, RecipeError
from octify.layout import Layout
from octify.module import OctaveModule
from octify.oracles import ReplicatePadding
from octify.plan import Plan, make_plan
from octify.recipe import Recipe
from octify.trace import trace_model

SHAPE = (1, 3, 64, 64)
bits = st.lists(st.booleans(), min_size=1, max_size=40)


@given(bits, bits)
def test_layouts_print_add_and_slice_like_their_bits(first: list[bool], second: list[bool]) -> None:
    one, two = Layout.of(first), Layout.of(second)
    assert Layout.parse(str(one)) == one
    assert (one + two).bits == (*first, *second)
    assert (one + two)[len(first) :] == two
    assert one.high_index + one.low_index == tuple(sorted(range(len(first)), key=lambda i: (first[i], i)))
    shuffled = list(one.high_index + one.low_index)
    assert [shuffled[position] for position in one.order] == list(range(len(first)))


@pytest.mark.parametrize("text", ["h", "4x", "-1h", "4h3", "l4"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a layout"):
        Layout.parse(text)


class Residual(nn.Module):
    """A stream of 16 channels that two blocks add to, and a branch that reads it through a cat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.enter = nn.Conv2d(16, 16, 1)
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.side = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(24, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(F.relu(self.stem(x)))
        x = x + self.a(x)
        x = x + self.b(F.relu(x))
        x = torch.cat((x, self.side(x)), 1)
        return self.last(x).mean((2, 3))


def gives(plan: Plan, target: str) -> str:
    return next(op.gives[0] for op in plan.ops if op.target == target)


def test_channels_that_are_added_share_their_bits_and_cat_adds_layouts() -> None:
    plan = octify.plan(Residual(), alpha=0.25, example_inputs=SHAPE)
    assert {gives(plan, name) for name in ("enter", "a", "b")} == {"12h4l"}
    assert gives(plan, "side") == "6h2l"
    assert gives(plan, "cat") == "12h4l6h2l"
    assert gives(plan, "stem") == "16h"


def test_writers_with_different_alphas_take_the_smallest_with_a_note() -> None:
    layers = [{"match": "b", "alpha": 0.5}]
    recipe = Recipe.from_dict({"version": 1, "defaults": {"alpha": 0.25}, "layers": layers})
    plan = octify.plan(Residual(), recipe=recipe, example_inputs=SHAPE)
    assert gives(plan, "b") == "12h4l"
    notes = next(op.notes for op in plan.ops if op.target == "b")
    assert any("takes alpha 0.25 of enter" in note for note in notes)


def test_round_to_and_layouts_in_a_recipe() -> None:
    layers = [{"match": "side", "layout": "2h3l3h"}]
    recipe = Recipe.from_dict({"version": 1, "defaults": {"alpha": 0.45, "round_to": 4}, "layers": layers})
    plan = octify.plan(Residual(), recipe=recipe, example_inputs=SHAPE)
    assert gives(plan, "a") == "12h4l"
    assert gives(plan, "side") == "2h3l3h"


class Grouped(nn.Module):
    """A 1x1 convolution between two grouped ones that divide its channels into nested groups."""

    def __init__(self, first: int = 4, second: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=first)
        self.again = nn.Conv2d(32, 32, 3, padding=1, groups=second)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.grouped(self.stem(x)))).mean((2, 3))


def test_every_group_gets_equally_many_low_channels() -> None:
    plan = octify.plan(Grouped(), alpha=0.25, example_inputs=SHAPE)
    layout = Layout.parse(gives(plan, "grouped"))
    assert {layout[start : start + 4].low for start in range(0, 32, 4)} == {1}
    assert {Layout.parse(gives(plan, "again"))[start : start + 4].low for start in range(0, 32, 4)} == {1}


def test_too_few_channels_a_group_says_what_would_do() -> None:
    plan = octify.plan(Grouped(16, 16), alpha=0.25, example_inputs=SHAPE)
    again = next(op for op in plan.convolutions if op.target == "again")
    assert "alpha 0.25 of 2 channels per group is less than one; nearest 0.5" in again.reason


def test_two_partitions_that_do_not_nest_leave_the_bundle_dense() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1)
            self.four, self.three = nn.Conv2d(12, 12, 1, groups=4), nn.Conv2d(12, 12, 1, groups=3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mix(self.stem(x))
            return (self.four(x) + self.three(x)).mean((2, 3))

    plan = octify.plan(Crossed(), alpha=0.5, example_inputs=SHAPE)
    assert gives(plan, "mix") == "12h"
    assert any("differently" in note for op in plan.ops for note in op.notes) or gives(plan, "four") == "12h"


def test_a_repeated_operand_and_a_shared_module() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(self.conv(self.stem(x)))
            return self.last(x + x).mean((2, 3))

    model = Shared().eval()
    plan = octify.plan(model, alpha=0.5, example_inputs=SHAPE)
    # The first call reads the dense stem, so the second must read a dense map too: one module has one layout.
    assert {op.gives[0] for op in plan.ops if op.target == "conv"} == {"8h"}
    converted = octify.convert(model, alpha=0.5, example_inputs=SHAPE)
    assert [op.target for op in octify.plan_of(converted).converted] == ["last"]
    assert converted(torch.ones(1, 3, 64, 64)).shape == (1, 2)


def test_a_conversion_that_changes_nothing_is_an_error_with_reasons() -> None:
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ConversionError, match=r"0 of 3 convolutions converted(.|\n)*less than twice min_size"):
        octify.convert(small, alpha=0.25, example_inputs=(1, 3, 12, 12))


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    recipe = Recipe.from_dict({"version": 1, "layers": [{"match": "sied", "alpha": 0.5}]})
    with pytest.raises(RecipeError, match=r"closest +side"):
        octify.plan(Residual(), recipe=recipe, example_inputs=SHAPE)


class Modes(nn.Module):
    """Functional dropout and an auxiliary head: train and eval mode compute different things."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head, self.aux = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(self.stem(x))
        aux = self.aux(x.mean((2, 3))) if self.training else None
        x = self.head(F.dropout(self.b(x).mean((2, 3)), 0.5, self.training))
        return x if aux is None else (x, aux)


def test_train_and_eval_behave_as_in_the_source() -> None:
    torch.manual_seed(0)
    model = Modes()
    converted = octify.convert(model, alpha=0.5, example_inputs=SHAPE)
    assert isinstance(converted, OctaveModule)
    x = torch.randn(2, 3, 64, 64)
    first, aux = converted(x)
    assert first.shape == aux.shape == (2, 4)
    assert not torch.equal(converted(x)[0], converted(x)[0]), "dropout is frozen"
    converted.eval()
    assert torch.equal(converted(x), converted(x))
    assert not any(node.target == "aux" for node in converted.graph.nodes), "the auxiliary head runs in eval mode"
    assert len(converted.train()(x)) == 2


def test_a_source_in_eval_mode_is_converted_in_eval_mode() -> None:
    """Without calling `eval()` on the result: that would also wake a dropout that was left in train mode."""
    x = torch.randn(2, 3, 64, 64)
    for copied in (lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))):
        converted = copied(octify.convert(Modes().eval(), alpha=0.5, example_inputs=SHAPE))
        assert not any(module.training for module in converted.modules())
        assert torch.equal(converted(x), converted(x))


def test_a_trace_leaves_the_source_untouched() -> None:
    model = Modes().eval()
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    names, flags = set(vars(model)), [module.training for module in model.modules()]
    octify.convert(model, alpha=0.5, example_inputs=SHAPE)
    assert before == {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    assert names == set(vars(model)) and flags == [module.training for module in model.modules()]


class Branches(nn.Module):
    """Its control flow depends on its size, which must be a number if `whole`."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        batch, channels, height, width = x.shape
        if height % 2 == 0:
            x = F.relu(x)
        if self.whole and not isinstance(height, int):
            raise TypeError("height")
        for _ in range(height // 62):
            x = x + 1
        return self.b(x).reshape(batch, channels, height * width).mean(2)


def test_branches_by_size_are_the_second_choice_and_guarded() -> None:
    model = Branches(whole=False).eval()
    trace = trace_model(model, (torch.empty(1, 3, 64, 64, device="meta"),))
    assert trace.how == "guarded"
    converted = octify.convert(model, alpha=0.0, example_inputs=SHAPE).eval()
    for size in ((5, 3, 64, 64), (2, 3, 46, 71), (1, 3, 47, 64), (1, 3, 200, 64)):
        x = torch.randn(size)
        assert torch.equal(converted(x), model(x))


def test_concrete_shapes_are_the_third_choice_and_keep_the_batch_free() -> None:
    model = Branches(whole=True).eval()
    trace = trace_model(model, (torch.empty(1, 3, 64, 64, device="meta"),))
    assert trace.how == "free batch"
    assert any("64x64 only" in note for note in trace.notes)
    converted = octify.convert(model, alpha=0.0, example_inputs=SHAPE).eval()
    x = torch.randn(5, 3, 64, 64)
    assert torch.equal(converted(x), model(x))


def test_plans_survive_json_and_decide_the_same() -> None:
    flows = read_flows(Residual(), choose_recipe(None, 0.25, None), SHAPE)
    plan = make_plan(flows)
    assert Plan.from_dict(plan.to_dict()) == plan
    again = make_plan(read_flows(Residual(), choose_recipe(None, 0.25, None), SHAPE))
    assert str(again) == str(plan) and again == plan


def test_rankings_choose_the_least_scores_and_ties_go_to_the_last_channels() -> None:
    flows = read_flows(Residual(), choose_recipe(None, 0.25, None), SHAPE)
    plan = make_plan(flows, {"side": [0.0, 5, 5, 5, 5, 1, 5, 5]})
    assert gives(plan, "side") == "1l4h1l2h"
    flows = read_flows(Residual(), choose_recipe(None, 0.25, None), SHAPE)
    assert gives(make_plan(flows, {"side": [1.0] * 8}), "side") == "6h2l"


def test_a_depthwise_convolution_on_a_dense_map_stays_dense() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
    )
    layers = [{"match": "1", "keep": "dense"}]
    recipe = Recipe.from_dict({"version": 1, "defaults": {"alpha": 0.5}, "layers": layers})
    converted = octify.convert(
        nn.Sequential(net, nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1)),
        recipe=Recipe.from_dict(
            {"version": 1, "defaults": {"alpha": 0.5}, "layers": [{"match": "0.1", "keep": "dense"}]}
        ),
        example_inputs=SHAPE,
    )
    assert gives(octify.plan_of(converted), "0.2") == "8h"
    assert converted(torch.ones(1, 3, 64, 64)).shape == (1, 2, 1, 1)
    assert gives(octify.plan(net, recipe=recipe, example_inputs=SHAPE), "2") == "8h"


def test_a_layer_with_a_hook_of_the_users_stays_as_it_is() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers, nn.Conv2d(16, 8, 1))
    seen: list[tuple[int, ...]] = []
    net[3].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    octave = octify.convert(net.eval(), alpha=0.5, example_inputs=(1, 3, 32, 32)).eval()
    made = {op.target for op in octify.plan_of(octave).converted}
    assert "3" not in made and made
    with torch.no_grad():
        seen.clear()
        octave(torch.rand(1, 3, 32, 32))
        assert seen == [(1, 16, 32, 32)]
    octave.train()(torch.rand(1, 3, 32, 32)).mean().backward()
    assert all(p.grad is not None for p in octave.parameters())


def test_a_layer_whose_weight_is_read_elsewhere_stays_as_it_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lent = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.body = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(torch.relu(self.lent(torch.relu(self.stem(x)))))
            return F.conv2d(torch.relu(x), self.lent.weight, padding=1)

    net = Tied().eval()
    octave = octify.convert(net, alpha=0.5, example_inputs=(1, 3, 32, 32)).eval()
    assert {op.target for op in octify.plan_of(octave).converted} >= {"body.1"}
    assert "its weights are read elsewhere too" in str(octify.plan_of(octave))
    with ReplicatePadding(), torch.no_grad():
        flat = torch.rand(1, 3, 1, 1).expand(1, 3, 32, 32).contiguous()
        assert torch.allclose(octave(flat), net(flat), atol=1e-6)
