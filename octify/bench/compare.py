"""Dense against octave in one process: latency, multiply-adds, memory."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octify.bench.clock import Progress, Timing, clock_of, interleave
from octify.bench.memory import peak_memory
from octify.bench.runners import FILES, Settings, runner, threads
from octify.convert import Example, example_of
from octify.cost import COUNTED, model_cost
from octify.errors import ModelError
from octify.graph import meta_copy, random_like, sharing_copy
from octify.module import OctaveModule


@dataclass(frozen=True)
class Comparison:
    """What was measured on one backend: `ratio` is octave's median over dense's, `quotient` that over `mac_ratio`.

    `ratio_quartiles` are of the ratios pair by pair. Peak memory is in MiB, of the maps alone; None where the runtime
    does not tell.
    """

    backend: str
    shapes: tuple[tuple[int, ...], ...]
    dense: Timing
    octave: Timing
    ratio: float
    ratio_quartiles: tuple[float, float]
    mac_ratio: float
    quotient: float
    dense_peak_mib: float | None
    octave_peak_mib: float | None
    rounds: int
    settings: dict[str, Any]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A tree of plain values for JSON."""
        return asdict(self)


def compare(
    dense: nn.Module,
    octave: nn.Module,
    inputs: Sequence[Tensor],
    settings: Settings | None = None,
    rounds: int = 30,
    warmup: int = 3,
    progress: Progress | None = None,
) -> Comparison:
    """Measures two networks, call by call in turn, on inputs of any device.

    Raises:
        BackendError: the backend is not installed, or cannot run one of them.
    """
    chosen = (settings or Settings()).checked()
    say = progress or _silent
    device = torch.device(chosen.device)
    with threads(chosen.threads):
        say(f"{chosen.backend}: preparing the dense network")
        calls = [runner(dense, inputs, chosen)]
        say(f"{chosen.backend}: preparing the octave network")
        calls.append(runner(octave, inputs, chosen))
        say(f"{chosen.backend}: {rounds} pairs")
        times = interleave(calls, rounds, warmup, clock_of(device))
        known = chosen.backend not in FILES
        peaks = [peak_memory(call, device) if known else None for call in calls]
    ratios = [one / other for other, one in zip(*times, strict=True)]
    timings = [Timing.of(seconds) for seconds in times]
    macs = mac_ratio(dense, octave, inputs)
    ratio = timings[1].median / timings[0].median
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Comparison(
        chosen.backend,
        tuple(tuple(value.shape) for value in inputs),
        timings[0],
        timings[1],
        ratio,
        (low, high),
        macs,
        ratio / macs,
        peaks[0],
        peaks[1],
        rounds,
        asdict(chosen),
        machine_of(device, chosen.threads),
    )


def _silent(_: str) -> None:
    """Says nothing."""


def bench(
    dense: nn.Module,
    octave: nn.Module,
    example_inputs: Example = None,
    *,
    backends: Sequence[str] = ("eager",),
    batch: int | None = None,
    rounds: int = 30,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Comparison]:
    """`compare` on several backends, with random inputs of the example's shape (of `batch` images if given).

    `settings` are those of `Settings`. Every backend is looked for before the first is measured.

    Raises:
        BackendError: a backend is not installed, or cannot run one of the networks.
    """
    chosen = [Settings(backend=backend, **settings).checked() for backend in backends]
    inputs = random_inputs(octave, example_inputs, batch)
    return [compare(dense, octave, inputs, each, rounds, progress=progress) for each in chosen]


def random_inputs(model: nn.Module, given: Example = None, batch: int | None = None) -> list[Tensor]:
    """Noise in the shapes of the example inputs."""
    seeded = torch.Generator().manual_seed(0)
    like = [value.new_empty((batch or len(value), *value.shape[1:])) for value in example_of(model, given)]
    if not like:
        raise ModelError("there are no example inputs to measure with")
    return [random_like(value.float() if value.is_floating_point() else value, seeded) for value in like]


def mac_ratio(dense: nn.Module, octave: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Multiply-adds of the octave network over the dense one's."""
    return _gmacs(octave, inputs) / _gmacs(dense, inputs)


def _gmacs(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    if isinstance(model, OctaveModule):
        return model_cost(model, tuple(inputs)).gmacs
    return graph_free_gmacs(model, inputs)


def graph_free_gmacs(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """The same count for a network that is no graph; one that decides by values runs on the inputs themselves."""
    with torch.no_grad():
        try:
            with FlopCounterMode(display=False) as counter:
                meta_copy(model).eval()(*(value.to("meta") for value in inputs))
        except Exception:  # whatever has no values to decide by
            with FlopCounterMode(display=False) as counter:
                place = next((tensor.device for tensor in model.parameters()), inputs[0].device)
                sharing_copy(model).eval()(*(value.to(place) for value in inputs))
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(flops for kind, flops in counts.items() if kind in COUNTED) / 2e9 / inputs[0].shape[0]


def machine_of(device: torch.device, count: int | None) -> dict[str, Any]:
    """What was measured on: the processor, its cores, the threads used, and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found = {"processor": name, "threads": count or torch.get_num_threads(), "system": platform.platform(terse=True)}
    return {**found, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]}, {len(named)} cores" if named else platform.processor() or platform.machine()
