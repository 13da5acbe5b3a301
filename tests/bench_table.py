"""`make bench`: the README's table of latencies, measured on this machine.

The table stands between `<!-- bench:begin -->` and `<!-- bench:end -->`; without those lines it goes into
tests/bench/table.md. `--quick` takes fewer pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import octify
from octify.bench import Comparison, bench
from octify.bench.compare import machine_of
from octify.conversion import Conversion
from octify.recipe import Recipe, load_recipe
from octify.zoo import build_model

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BACKENDS = ("eager", "compile", "onnxruntime", "openvino")
NETS = ("torchvision:resnet50", "torchvision:resnext50_32x4d", "torchvision:densenet121", "timm:mobilenetv1_100",
        "torchvision:mobilenet_v2")  # fmt: skip
HEAD = "| network | alpha | backend | batch, threads | dense ms | octave ms | ratio | multiply-adds | quotient |"


def measure(name: str, alpha: float, backends: tuple[str, ...], batch: int, threads: int, rounds: int) -> list[str]:
    """One row a backend."""
    source = build_model(name)
    plain = Conversion.read(source, Recipe.uniform(0.0))
    octave = octify.convert(source, recipe=load_recipe("resnet" if "resn" in name else "uniform", alpha))
    dense = plain.apply(plain.plan())
    found = bench(dense, octave, backends=backends, batch=batch, threads=threads, rounds=rounds, progress=print)
    return [row(name, alpha, batch, threads, each) for each in found]


def row(name: str, alpha: float, batch: int, threads: int, found: Comparison) -> str:
    """A comparison as a line of the table."""
    ratio = f"{found.ratio:.3f} ({found.ratio_quartiles[0]:.3f}–{found.ratio_quartiles[1]:.3f})"
    cells = [name.partition(":")[2], f"{alpha:g}", found.backend, f"{batch}, {threads}", f"{found.dense.median:.1f}"]
    cells += [f"{found.octave.median:.1f}", ratio, f"{found.mac_ratio:.3f}", f"{found.quotient:.3f}"]
    return "| " + " | ".join(cells) + " |"


def write(table: str) -> Path:
    """Puts the table into its place."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if BEGIN in text and END in text:
        head, _, rest = text.partition(BEGIN)
        readme.write_text(f"{head}{BEGIN}\n{table}{END}{rest.partition(END)[2]}", encoding="utf-8")
        return readme
    place = ROOT / "tests" / "bench" / "table.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text(table, encoding="utf-8")
    return place


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer pairs, ResNet-50 alone, without compiling")
    quick = parser.parse_args().quick
    rounds = 12 if quick else 40
    backends = tuple(name for name in BACKENDS if not quick or name != "compile")
    rows = [line for alpha in (0.5, 0.25) for line in measure(NETS[0], alpha, backends, 1, 1, rounds)]
    if not quick:
        for name in NETS[1:]:
            rows += measure(name, 0.5, ("compile",), 1, 1, rounds)
        rows += measure(NETS[0], 0.5, ("compile",), 16, 2, 8)
    machine = machine_of(torch.device("cpu"), 1)
    where = f"{machine['processor']}, torch {machine['torch']}"
    lines = [f"Measured by `make bench` on {where}, float32, 224×224.", "", HEAD, "|" + " --- |" * 9, *rows]
    print("written to", write("\n".join(lines) + "\n"))


if __name__ == "__main__":
    main()
