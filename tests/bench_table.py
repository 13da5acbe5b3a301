"""`make bench`: the README's tables of latencies, measured on this machine.

The first compares backends and networks, the second holds what `--only-faster` makes of a dozen networks, measured
once more when it has chosen. They stand between `<!-- bench:begin -->` and `<!-- bench:end -->`, and the same with
"faster", "kinds" and "profile" (where ResNet-50's time goes in the runtimes). `--part` measures one of them; `--quick`
takes fewer pairs, and ResNet-50 alone without compiling.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from octify.bench import Comparison, Settings, bench, only_faster, profile
from octify.bench.compare import machine_of
from octify.conversion import Conversion
from octify.recipe import Recipe, load_recipe
from octify.report_speed import kind_cells
from octify.zoo import build_model

README = Path(__file__).parents[1] / "README.md"
BACKENDS = ("eager", "compile", "onnxruntime", "openvino")
NETS = ("torchvision:resnet50", "torchvision:resnext50_32x4d", "torchvision:densenet121", "timm:mobilenetv1_100",
        "torchvision:mobilenet_v2")  # fmt: skip
CHOOSING = (
    "torchvision:resnet18", "torchvision:resnet50", "torchvision:resnext50_32x4d", "torchvision:densenet121",
    "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_large", "timm:mobilenetv1_100", "timm:efficientnet_b0",
    "torchvision:regnet_y_400mf", "torchvision:shufflenet_v2_x1_0", "torchvision:squeezenet1_1", "timm:repvgg_a0",
)  # fmt: skip
KINDS = (
    "timm:resnet50_gn", "timm:resnetv2_50x1_bit", "timm:convnext_tiny", "timm:regnetz_b16", "timm:nf_resnet50",
    "timm:hardcorenas_a", "torchvision:r3d_18", "torchvision:mc3_18",
)  # fmt: skip
HEAD = "| network | alpha | backend | batch, threads | dense ms | octave ms | ratio | multiply-adds | quotient |"
CHOSEN = "| network | bundles octave | dense ms | chosen ms | ratio | multiply-adds |"


def measure(
    name: str, alpha: float, backends: tuple[str, ...], batch: int, threads: int, rounds: int, train: bool = False
) -> list[str]:
    """One row a backend."""
    source = build_model(name)
    dense, octave = converted(source), converted(source, recipe_of(name, alpha))
    options = {"batch": batch, "threads": threads, "rounds": rounds, "train": train, "progress": print}
    found = bench(dense, octave, backends=backends, **options)
    return [row(name, alpha, batch, threads, each) for each in found]


def recipe_of(name: str, alpha: float) -> Recipe:
    """The paper's for ResNets, where its last stage is dense."""
    return load_recipe("resnet" if "resn" in name else "uniform", alpha)


def converted(source: nn.Module, recipe: Recipe | None = None) -> nn.Module:
    """By a recipe, also by one that converts nothing, or dense as a graph: both go through the same passes."""
    reading = Conversion.read(source, recipe or Recipe.uniform(0.0))
    return reading.apply(reading.plan())


def choose(name: str, rounds: int) -> str:
    """What `--only-faster` keeps of a network at alpha 0.5, and how fast that is."""
    source = build_model(name)
    found = only_faster(source, recipe_of(name, 0.5), None, Settings(threads=1), 8, print)
    kept, count = (sum(row.bundles for row in found.bundles if row.octave or all_) for all_ in (False, True))
    [again] = bench(converted(source), converted(source, found.recipe), threads=1, rounds=rounds)
    ratio = f"{again.ratio:.3f} ({again.ratio_quartiles[0]:.3f}–{again.ratio_quartiles[1]:.3f})"
    cells = [name.partition(":")[2], f"{kept} of {count}", f"{again.dense.median:.1f}"]
    return "| " + " | ".join([*cells, f"{again.octave.median:.1f}", ratio, f"{again.mac_ratio:.3f}"]) + " |"


def row(name: str, alpha: float, batch: int, threads: int, found: Comparison) -> str:
    """A comparison as a line of the table."""
    ratio = f"{found.ratio:.3f} ({found.ratio_quartiles[0]:.3f}–{found.ratio_quartiles[1]:.3f})"
    kind = f"{found.backend}, training" if found.settings["train"] else found.backend
    cells = [name.partition(":")[2], f"{alpha:g}", kind, f"{batch}, {threads}", f"{found.dense.median:.1f}"]
    cells += [f"{found.octave.median:.1f}", ratio, f"{found.mac_ratio:.3f}", f"{found.quotient:.3f}"]
    return "| " + " | ".join(cells) + " |"


def write(part: str, lines: list[str]) -> None:
    """Puts a table into its place."""
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    head, _, rest = README.read_text(encoding="utf-8").partition(begin)
    table = "\n".join(lines)
    README.write_text(f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def compare_all(rounds: int, quick: bool) -> list[str]:
    """The table of backends and networks."""
    backends = tuple(name for name in BACKENDS if not quick or name != "compile")
    rows = [line for alpha in (0.5, 0.25) for line in measure(NETS[0], alpha, backends, 1, 1, rounds)]
    if not quick:
        for name in NETS[1:]:
            rows += measure(name, 0.5, ("compile",), 1, 1, rounds)
        rows += measure(NETS[0], 0.5, ("compile",), 16, 2, 8)
        rows += measure(NETS[0], 0.5, ("eager",), 16, 1, 6, train=True)
    return [f"Measured by `make bench` on {_machine()}, float32, 224×224.", "", HEAD, "|" + " --- |" * 9, *rows]


def choose_all(rounds: int) -> list[str]:
    """The table of `--only-faster`."""
    start = f"`octify bench MODEL --alpha 0.5 --only-faster --threads 1` on {_machine()}, eager, one image:"
    return [start, "", CHOSEN, "|" + " --- |" * 6, *(choose(name, rounds) for name in CHOOSING)]


def compare_kinds(rounds: int) -> list[str]:
    """The table of other kinds of networks, at their own sizes."""
    rows = [line for name in KINDS for line in measure(name, 0.5, ("eager",), 1, 1, min(rounds, 12))]
    return [f"`octify bench MODEL --alpha 0.5 --threads 1` on {_machine()}:", "", HEAD, "|" + " --- |" * 9, *rows]


def profile_all(rounds: int) -> list[str]:
    """Where the runtimes spend ResNet-50's time."""
    source = build_model(NETS[0])
    dense, octave = converted(source), converted(source, recipe_of(NETS[0], 0.5))
    found = profile(dense, octave, backends=("onnxruntime", "openvino"), threads=1, rounds=rounds, progress=print)
    command = "`octify bench resnet50 --recipe resnet --alpha 0.5 --threads 1 --profile"
    lines = [f"{command} --backend onnxruntime,openvino` on {_machine()}:", ""]
    lines += ["| backend | operation | dense | ms | octave | ms | ratio |", "| --- | --- |" + " --: |" * 5]
    for each in found:
        rows = [row for row in each.to_dict()["kinds"] if max(row["dense_ms"], row["octave_ms"]) >= 0.05]
        for row in (*rows, each.to_dict()["total"]):
            lines.append("| " + " | ".join([each.backend, *kind_cells(row)]) + " |")
    return lines


def _machine() -> str:
    machine = machine_of(torch.device("cpu"), 1)
    return f"{machine['processor']}, torch {machine['torch']}"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=["bench", "faster", "kinds", "profile"])
    given = parser.parse_args()
    rounds = 12 if given.quick else 40
    if given.part in (None, "bench"):
        write("bench", compare_all(rounds, given.quick))
    if given.part in (None, "faster") and not given.quick:
        write("faster", choose_all(rounds))
    if given.part in (None, "kinds") and not given.quick:
        write("kinds", compare_kinds(rounds))
    if given.part in (None, "profile"):
        write("profile", profile_all(rounds))


if __name__ == "__main__":
    main()
