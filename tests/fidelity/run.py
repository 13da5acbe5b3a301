"""`make fidelity`: trains the nets (cached), converts them step by step and writes CSV, plot and the README's table.

Everything: `python -m tests.fidelity.run --seed 0 --seed 1 --seed 2`. A part: `--net residual --step fold --at 0.5`;
rows measured before stay in the file, those measured again are replaced. `--show` only prints and draws what is there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.fidelity.data import Pictures
from tests.fidelity.nets import NETS
from tests.fidelity.show import PLOT, Result, fewer, plot, read_results, table, write_readme, write_results
from tests.fidelity.steps import Wanted, octave_points, pruned_points
from tests.fidelity.train import load_net, load_pictures

INTRO = """Share of the dense top-1 accuracy that is kept (`make fidelity`): small networks trained here on digits over
photographs (64x64 pixels, ten classes, accuracy of the dense net in parentheses), {} images without labels, 2000
other pictures to test, mean ± half the range over seeds (without ±: one seed). Cost is multiply-adds against dense;
between two measured costs the line between them. Pruned: Torch-Pruning's group magnitude, which one would take else."""


def measure_net(name: str, seed: int, samples: int, tests: int, wanted: Wanted) -> Iterator[Result]:
    """Every point of one trained net; test pictures are only ever looked at here."""
    net, _ = load_net(name, seed)
    calibration = load_pictures("calibration", seed).first(samples).batches(32)
    test = load_pictures("test").first(tests)
    truth = predict(net, test)
    dense = share(truth, test.labels)

    pruned = pruned_points(name, net, calibration, wanted)
    for point in itertools.chain(octave_points(net, calibration, wanted), pruned):
        found = predict(point.net, test)
        right = share(found, test.labels)
        yield Result(
            name, seed, samples, point.step, point.sweep, point.asked, point.cost,
            dense, right, right / dense, share(found, truth),
        )  # fmt: skip


@torch.inference_mode()
def predict(net: nn.Module, pictures: Pictures) -> Tensor:
    """Top-1 classes (N,), on the GPU when there is one."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = copy.deepcopy(net).to(where)
    return torch.cat([moved(x.to(where)).argmax(1).cpu() for x in pictures.batches(100)])


def share(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=[*NETS], action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--step", action="append", default=[], help="a step's name as printed; all without it")
    parser.add_argument("--at", type=float, action="append", default=[], help="an alpha or target; all without it")
    parser.add_argument("--samples", type=int, default=256, help="calibration pictures, at most 512")
    parser.add_argument("--test", type=int, default=2000, help="test pictures, at most 2000")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()

    def wanted(step: str, at: float) -> bool:
        return (not options.step or step in options.step) and (not options.at or at in options.at)

    results = read_results()
    pairs = [] if options.show else itertools.product(options.net or NETS, options.seed or [0])
    for name, seed in pairs:
        for row in measure_net(name, seed, options.samples, options.test, wanted):
            print(f"{name:14}{seed:2} {row.step:34}{row.asked:6g}  cost {row.cost:.3f}  {row.retained:.3f}", flush=True)
            results[row.key] = row
            write_results(results.values())
    shown = [row for row in results.values() if row.samples == options.samples]
    plot(shown)
    text = "\n\n".join([INTRO.format(options.samples), table(shown), *fewer(results.values(), options.samples)])
    print(text)
    write_readme(f"{text}\n\n![accuracy kept against multiply-adds](tests/fidelity/{PLOT.name})")


if __name__ == "__main__":
    main()
