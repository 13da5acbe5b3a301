"""Recipes: what they say of a layer, what they refuse, and that they survive every way out and back."""

from __future__ import annotations

import copy
import json
import pickle
import string
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from octify.errors import RecipeError
from octify.recipe import Recipe, builtin_recipes, load_recipe, recipe_text

RESNET = [("conv1", "Conv2d")] + [
    (f"layer{stage}.{block}.{name}", kind)
    for stage in (1, 2, 3, 4)
    for block in (0, 1)
    for name, kind in (("conv1", "Conv2d"), ("bn1", "BatchNorm2d"), ("relu", "ReLU"))
]


def recipe(text: str, alpha: float | None = None) -> Recipe:
    return Recipe.from_yaml("version: 1\n" + text, "my.yaml", alpha)


def refusal(text: str, alpha: float | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(text, alpha)
    return str(caught.value)


# What it says of a layer


def test_the_first_rule_that_matches_decides_alone() -> None:
    found = recipe(
        "defaults: {alpha: 0.5, min_size: 3, round_to: 8, downsample: pool}\n"
        "layers:\n"
        "  - {match: layer1.0.*, kernels: paper}\n"
        "  - {match: layer1, alpha: 0.125, round_to: 4}\n"
        "  - {type: 'Conv?d', alpha: 0}\n"
    )
    first = found.settings_for("layer1.0.conv1", "Conv2d")
    assert (first.alpha, first.kernels, first.round_to, first.source) == (0.5, "paper", 8, "my.yaml:4")
    second = found.settings_for("layer1.1.conv1", "Conv2d")
    assert (second.alpha, second.kernels, second.round_to, second.source) == (0.125, "sharp", 4, "my.yaml:5")
    assert second.rule == 'match "layer1"'
    third = found.settings_for("layer2.0.conv1", "Conv2d")
    assert (third.alpha, third.min_size, third.downsample, third.source) == (0, 3, "pool", "my.yaml:6")
    other = found.settings_for("layer2.0.bn1", "BatchNorm2d")
    assert (other.alpha, other.source, other.rule) == (0.5, "default", "")


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("match: layer1", "layer1.0.conv1", True),
        ("match: layer1", "layer10.conv1", False),
        ("match: layer1.*", "layer1.0.conv1", True),
        ("match: layer1.*", "layer1", False),
        ("match: '*.conv1'", "layer1.0.conv1", True),
        ("match: '*.conv1'", "conv1", False),
        ("match: 'layer[12].?.conv1'", "layer2.0.conv1", True),
        ("match: LAYER1", "layer1.0", False),
        ("match: '*'", "a", True),
        ("regex: 'layer[12]'", "layer2.0.conv1", True),
        ("regex: 'layer'", "layer2.0.conv1", False),
        (r"regex: '.*\.conv\d'", "layer2.0.conv1", True),
        ("type: Conv2d", "anything", True),
        ("type: '*2d'", "anything", True),
        ("type: Conv", "anything", False),
    ],
)
def test_patterns(pattern: str, path: str, hit: bool) -> None:
    found = recipe(f"layers:\n  - {{{pattern}, alpha: 1}}\n")
    assert (found.settings_for(path, "Conv2d").alpha == 1) is hit


def test_rules_by_name_and_by_pattern_keep_their_order() -> None:
    found = recipe(
        "layers:\n  - {match: '*.b', alpha: 0.1}\n  - {match: a.b, alpha: 0.2}\n  - {match: c, alpha: 0.3}\n"
    )
    assert found.settings_for("a.b", "Conv2d").alpha == 0.1
    found = recipe("layers:\n  - {match: a.b, alpha: 0.2}\n  - {match: a, alpha: 0.3}\n  - {regex: a.*, alpha: 0.1}\n")
    assert [found.settings_for(path, "Conv2d").alpha for path in ("a.b", "a.c", "ab")] == [0.2, 0.3, 0.1]


def test_alpha_is_a_parameter() -> None:
    layers = "layers: [{match: a, alpha: $alpha}, {match: b, alpha: 0}]"
    text = f"parameters: {{alpha: 0.25}}\ndefaults: {{alpha: $alpha}}\n{layers}"
    for found, alpha in ((recipe(text), 0.25), (recipe(text, 0.5), 0.5), (recipe(text).with_alpha(0.75), 0.75)):
        assert [found.settings_for(path, "Conv2d").alpha for path in ("x", "a", "b")] == [alpha, alpha, 0]
        assert found.alpha == alpha
    assert recipe("defaults: {alpha: $alpha}", 0.5).alpha == 0.5
    assert recipe(text).with_alpha(0.5).settings_for("b", "Conv2d").source == "my.yaml:4"
    assert recipe("name: x").alpha == 0


def test_kernels_and_downsampling_go_with_the_operator() -> None:
    found = recipe(
        "defaults: {kernels: paper, c0: 64}\n"
        "layers:\n"
        "  - {match: a, operator: compconv, options: {depth: 2}}\n"
        "  - {match: b, operator: compconv, kernels: all, c0: 256}\n"
        "  - {match: c, kernels: fold}\n"
        "  - {match: d, keep: dense}\n"
        "  - {match: e, operator: keep}\n"
        "  - {match: f, operator: mine, kernels: spatial, options: {groups: 4, how: x, 'on': true}}\n"
        "  - {match: g, downsample: stride, paths: [hh, ll]}\n"
    )
    at = {name: found.settings_for(name, "Conv2d") for name in "abcdefgh"}
    assert (at["a"].operator, at["a"].kernels, at["a"].options) == ("compconv", "spatial", {"depth": 2})
    assert (at["b"].kernels, at["b"].options) == ("all", {"c0": 256})
    assert (at["c"].kernels, at["c"].downsample, at["c"].options) == ("fold", "stride", {"c0": 64})
    assert at["d"].keep and at["e"].keep and not at["c"].keep
    assert (at["f"].kernels, at["f"].options) == ("spatial", {"groups": 4, "how": "x", "on": True})
    assert (at["g"].downsample, at["g"].paths) == ("stride", ("hh", "ll"))
    assert (at["h"].kernels, at["h"].downsample, at["h"].paths) == ("paper", "pool", ("hh", "hl", "lh", "ll"))


def test_the_stem_is_dense_unless_the_recipe_says_more_of_it() -> None:
    assert Recipe.uniform(0.5).settings_for("conv1", "Conv2d").stem
    assert not recipe("defaults: {stem: octave}").settings_for("conv1", "Conv2d").stem
    found = recipe("layers: [{match: a, alpha: 0.5}, {match: b, layout: 4h4l}, {match: c, kernels: paper}]")
    assert [found.settings_for(name, "Conv2d").stem for name in "abc"] == [False, False, True]


def test_other_defaults() -> None:
    found = recipe("defaults: {alpha: 0.5}\nlayers: [{match: a, kernels: fold}]").with_defaults(kernels="paper")
    assert [found.settings_for(name, "Conv2d").kernels for name in "ab"] == ["fold", "paper"]
    assert found.settings_for("a", "Conv2d").source == "my.yaml:3"
    other = Recipe.uniform(0.25).with_defaults(operator="compconv", c0=64)
    assert (other.settings_for("a", "Conv2d").kernels, other.defaults.c0) == ("spatial", 64)
    with pytest.raises(RecipeError, match=r"unknown key \"kernel\"\n  closest   kernels"):
        found.with_defaults(kernel="paper")


# What it refuses


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("default: {alpha: 1}", 2, 'unknown key "default"\n  closest   defaults'),
        ("defaults:\n  alpha: 0\n  alhpa: 1", 4, 'unknown key "alhpa"\n  closest   alpha'),
        ("layers:\n  - match: a\n    kernel: fold", 4, 'unknown key "kernel"\n  closest   kernels'),
        ("defaults: {alpha: 1.5}", 2, "defaults.alpha is 1.5: expected a number from 0 to 1, or $alpha\n  closest   1"),
        ("defaults: {alpha: -1}", 2, "\n  closest   0"),
        ("defaults: {alpha: '0.5'}", 2, 'defaults.alpha is "0.5": expected a number'),
        ("defaults: {alpha: true}", 2, "defaults.alpha is true: expected a number"),
        ("defaults: {alpha: .nan}", 2, "expected a number from 0 to 1"),
        ("defaults: {alpha: $alhpa}", 2, "\n  closest   $alpha"),
        ("defaults: {alpha: $alpha}", 2, "$alpha has no value"),
        ("layers:\n  - match: a\n    alpha: $alpha", 4, "$alpha has no value"),
        ("parameters: {alpha: 2}", 2, "parameters.alpha is 2: expected less than or equal to 1\n  closest   1"),
        (
            "defaults: {kernels: papr}",
            2,
            "is \"papr\": expected 'sharp', 'fold', 'paper', 'spatial' or 'all'\n  closest   paper",
        ),
        ("defaults: {kernels: all}", 2, "operator octave has sharp or fold or paper kernels"),
        (
            "layers:\n  - {match: a}\n  - {match: a, operator: compconv, kernels: fold}",
            4,
            "operator compconv has spatial",
        ),
        ("defaults: {operator: Octave}", 2, "expected the name of an operator"),
        ("defaults: {min_size: 0}", 2, "min_size is 0: expected greater than or equal to 1\n  closest   1"),
        ("defaults: {min_size: 2.5}", 2, "expected a whole number"),
        ("defaults: {round_to: 8.0}", 2, "expected a whole number"),
        ("defaults: {paths: [hh]}", 2, "expected hh and ll"),
        ("defaults:\n  paths:\n  - hh\n  - xx", 5, 'paths.1 is "xx"'),
        ("defaults: 3", 2, "defaults is 3: expected keys and values"),
        ("layers: {match: a}", 2, "expected a list"),
        ("layers: [3]", 2, "layers.0 is 3: expected keys and values"),
        ("layers:\n  - alpha: 1", 3, "one of match, type and regex"),
        ("layers:\n  - {match: a, regex: b}", 3, "one of match, type and regex"),
        ("layers:\n  - {match: ''}", 3, "expected a pattern"),
        ("layers:\n  - {match: 'a[b'}", 3, "never closed"),
        ("layers:\n  - {regex: '(a'}", 3, 'layers.0.regex is "(a": it is no regular expression: missing )'),
        ("layers:\n  - {regex: " + "a" * 301 + "}", 3, "at most 300 characters"),
        ("layers:\n  - {match: a, keep: dense, alpha: 0}", 3, "leave out alpha"),
        ("layers:\n  - {match: a, keep: octave}", 3, "expected 'dense'"),
        ("layers:\n  - {match: a, layout: 4h, alpha: 0}", 3, "leave out alpha or layout"),
        ("layers:\n  - {match: a, layout: 4x}", 3, "expected counts of high and low channels, such as 48h16l"),
        ("layers:\n  - {match: a, stem: octave}", 3, 'unknown key "stem"'),
        ("layers:\n  - {match: a, options: {'a b': 1}}", 3, "String should match pattern"),
        ("layers:\n  - match: a\n    options: {a: [1]}", 4, "layers.0.options.a is [1]: expected text"),
        ("on_unsupported: skip", 2, "expected 'dense' or 'error'"),
        ("version: 1", 2, '"version" is given twice, first in line 1'),
        ("defaults: {alpha: 0, alpha: 1}", 2, "given twice"),
        ("defaults: !!python/object/apply:os.system [ls]", 2, "a value of kind python/object"),
        ("name: 2020-01-01", 2, "in quotes"),
        ("1: 2", 2, "a key that is not text"),
        ("defaults: {alpha: 1", 2, "is not YAML"),
        ("defaults: *nothing", 2, "undefined alias"),
        ("name: x\n---\nname: y", 3, "is not YAML"),
        ("defaults: [" * 20, 2, "nested more than"),
        ("a: &a [*a]", 2, "aliases"),
        ("a: &a {<<: *a}", 2, "merges itself"),
    ],
)
def test_refusals_name_the_line_and_what_is_legal(text: str, line: int, message: str) -> None:
    said = refusal(text)
    assert message in said
    assert said.startswith(f"my.yaml:{line}: ")


@pytest.mark.parametrize("text", ["", "- 1", "3", "null"])
def test_what_is_no_mapping_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeError, match=r"my.yaml:1: is empty or no mapping"):
        Recipe.from_yaml(text, "my.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("version: 2", "closest   1"), ("version: true", "number"), ("name: a", "missing")]
)
def test_only_version_1_is_read(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s)my.yaml:1: version.*{message}"):
        Recipe.from_yaml(text, "my.yaml")


def test_every_fault_is_named_in_the_order_of_the_lines() -> None:
    said = refusal("defaults:\n  min_size: 0\n  alpha: 2\nlayers:\n  - {match: a, alpha: x}\n")
    assert [part for part in said.split() if part.startswith("my.yaml")] == ["my.yaml:3:", "my.yaml:4:", "my.yaml:6:"]


def test_an_alpha_that_the_recipe_has_no_place_for() -> None:
    assert "my.yaml:2: alpha is fixed here: write alpha: $alpha" in refusal("defaults: {alpha: 0.5}", alpha=0.25)
    assert "expected less than or equal to 1" in refusal("defaults: {alpha: $alpha}", alpha=1.5)


def test_bombs_are_refused_quickly() -> None:
    lists = "\n".join(["a0: &a0 [x, x]"] + [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12)])
    merges = "\n".join(
        ["a0: &a0 {x: 1}"] + [f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}" for n in range(12)]
    )
    start = time.process_time()
    assert "aliases write out to more" in refusal(lists)
    assert "aliases write out to more" in refusal(merges)
    assert "nested more than" in refusal("a: " + "[" * 400_000)
    assert "nested more than" in refusal("a: " + "{a: " * 100_000)
    assert "values" in refusal("a: [" + "1, " * 60_000)
    assert time.process_time() - start < 30


def test_a_pattern_that_matches_nothing_names_the_closest() -> None:
    found = recipe("layers:\n  - {match: layer5.*}\n  - {match: layer1}\n  - {type: Conv3d}\n  - {regex: 'layr[12]'}\n")
    with pytest.raises(RecipeError) as caught:
        found.check_matches(RESNET, "ResNet")
    lines = str(caught.value).splitlines()
    assert lines[0] == 'my.yaml:3: match "layer5.*" names no module of ResNet.'
    assert lines[1].startswith("  closest   layer4, layer")
    assert lines[2:4] == ['my.yaml:5: type "Conv3d" names no module of ResNet.', "  closest   Conv2d"]
    assert lines[4].startswith("my.yaml:6: regex ") and "layer1" in lines[5]
    recipe("layers: [{match: layer1}, {regex: layer2.*}, {type: ReLU}]").check_matches(RESNET)


# Files


def test_builtin_recipes_are_read_by_name_and_take_an_alpha() -> None:
    assert {"uniform", "resnet", "stages"} <= set(builtin_recipes())
    for name in builtin_recipes():
        found = load_recipe(name)
        assert Recipe.from_yaml(recipe_text(name)) == found == load_recipe(f"{name}.yaml")
        assert found.description, name
    assert load_recipe("resnet", alpha=0.5).settings_for("layer1.0.conv1", "Conv2d").alpha == 0.5
    last = load_recipe("resnet").settings_for("layer4.0.conv1", "Conv2d")
    assert last.alpha == 0 and last.source.startswith("recipes/resnet.yaml:")
    alphas = [load_recipe("stages").settings_for(f"layer{n}.0", "Conv2d").alpha for n in (1, 2, 3, 4)]
    assert alphas == sorted(alphas, reverse=True) and alphas[-1] == 0


def test_files_come_before_builtin_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet.yaml").write_text("version: 1\nname: mine\n")
    assert (load_recipe("resnet.yaml").name, load_recipe("resnet").name) == ("mine", "resnet")
    assert load_recipe(tmp_path / "resnet.yaml").name == "mine"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)\"resnt\" is neither a file.*closest   resnet"):
        load_recipe("resnt")
    with pytest.raises(RecipeError, match=r"there are   .*uniform"):
        load_recipe("../../pyproject")
    with pytest.raises(RecipeError, match="no recipe"):
        recipe_text("../pyproject")
    big, latin = tmp_path / "big.yaml", tmp_path / "latin.yaml"
    big.write_bytes(b"#" * 1_000_001)
    latin.write_bytes(b"version: 1\nname: \xe9\n")
    with pytest.raises(RecipeError, match="larger than 1,000,000 bytes"):
        load_recipe(big)
    with pytest.raises(RecipeError, match=r"latin.yaml:2: is not UTF-8"):
        load_recipe(latin)


def test_anchors_and_merges() -> None:
    found = recipe("layers:\n  - &base {match: a, alpha: 0.5, round_to: 8}\n  - {<<: *base, match: b, alpha: 0.25}\n")
    settings = found.settings_for("b", "Conv2d")
    assert (settings.alpha, settings.round_to, settings.source) == (0.25, 8, "my.yaml:4")


# Every way out and back

names = st.text(string.ascii_letters + "é: #'\"{}[]*&!|>%@`\\\n", max_size=20)
words = st.text(string.ascii_letters + "é: #'\"{}[]*&!|>%@`\\", max_size=20)
patterns = st.text(string.ascii_lowercase + ".*?:#'\" é", min_size=1, max_size=20)
choices: dict[str, st.SearchStrategy[Any]] = {
    "alpha": st.one_of(st.just("$alpha"), st.floats(0, 1), st.sampled_from([0, 1])),
    "downsample": st.sampled_from(["stride", "pool"]),
    "paths": st.sampled_from([["hh", "ll"], ["hh", "hl", "ll"], ["ll", "lh", "hl", "hh"]]),
    "min_size": st.integers(1, 100),
    "round_to": st.integers(1, 100),
    "c0": st.integers(1, 1000),
    "options": st.dictionaries(
        st.sampled_from(["depth", "on", "n", "a_1"]),
        st.one_of(words, st.integers(), st.booleans(), st.floats(-10, 10)),
        max_size=3,
    ),
}
rules = st.builds(
    lambda pattern, rest: {**pattern, **rest},
    st.one_of(*[st.fixed_dictionaries({kind: patterns}) for kind in ("match", "type")]),
    st.fixed_dictionaries({}, optional={**choices, "kernels": st.sampled_from(["sharp", "fold", "paper"])}),
)
recipes = st.fixed_dictionaries(
    {"version": st.just(1), "parameters": st.fixed_dictionaries({"alpha": st.floats(0, 1)})},
    optional={
        "name": names,
        "description": names,
        "defaults": st.fixed_dictionaries({}, optional={**choices, "stem": st.sampled_from(["dense", "octave"])}),
        "layers": st.lists(rules, max_size=4),
        "on_unsupported": st.sampled_from(["dense", "error"]),
    },
)


@given(recipes)
def test_recipes_survive_dict_json_yaml_and_pickle(data: dict[str, Any]) -> None:
    found = Recipe.from_dict(data)
    ways = [
        Recipe.from_dict(json.loads(json.dumps(found.to_dict()))),
        Recipe.from_yaml(found.to_yaml()),
        Recipe.from_yaml(yaml.safe_dump(data, sort_keys=False)),
        pickle.loads(pickle.dumps(found)),
        copy.deepcopy(found),
    ]
    for way in ways:
        assert way == found
        assert hash(way) == hash(found)
        assert way.to_yaml() == found.to_yaml()
    assert len(found.to_yaml().partition("\nlayers:\n")[2].splitlines()) == len(found.layers)


def test_recipes_differ_where_they_say_something_else() -> None:
    assert Recipe.uniform(0.25) != Recipe.uniform(0.5)
    assert Recipe.uniform(0.25) == Recipe.uniform(0.25)
    assert recipe("layers: [{match: a}, {match: b}]") != recipe("layers: [{match: b}, {match: a}]")


def test_hundreds_of_rules_by_name_are_found_quickly() -> None:
    paths = [f"blocks.{index}.conv" for index in range(2000)]
    found = Recipe.from_dict({"version": 1, "layers": [{"match": path, "alpha": 0.5} for path in paths]})
    start = time.process_time()
    found.check_matches([(path, "Conv2d") for path in paths])
    assert all(found.settings_for(path, "Conv2d").source == f"recipe: layers.{n}" for n, path in enumerate(paths))
    assert time.process_time() - start < 2
