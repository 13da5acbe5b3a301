"""Where the time goes: what a network's operations take, kind by kind, in the runtimes that time them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octify.bench.clock import Progress
from octify.bench.compare import mac_ratio, random_inputs
from octify.bench.runners import Settings, exported, threads
from octify.convert import Example
from octify.errors import BackendError
from octify.runtimes import onnx_session, openvino_request, run_onnx, run_openvino

Times = list[tuple[str, float]]  # of one call: the kind of each operation that ran, and its ms


@dataclass(frozen=True)
class Kind:
    """One kind of operation: how many run in a call, and the median of what they take together in ms."""

    kind: str
    dense: int
    octave: int
    dense_ms: float
    octave_ms: float


@dataclass(frozen=True)
class Profile:
    """The kinds of operations of two networks in a runtime, the slowest of the octave one's first."""

    backend: str
    kinds: tuple[Kind, ...]
    mac_ratio: float
    rounds: int
    settings: dict[str, Any]

    @property
    def total(self) -> Kind:
        """All kinds together."""
        rows = [(row.dense, row.octave, row.dense_ms, row.octave_ms) for row in self.kinds]
        dense, octave, dense_ms, octave_ms = (sum(column) for column in zip(*rows, strict=True))
        return Kind("all", int(dense), int(octave), dense_ms, octave_ms)

    def to_dict(self) -> dict[str, Any]:
        """A tree of plain values for JSON."""
        return {**asdict(self), "total": asdict(self.total)}


def profile(
    dense: nn.Module,
    octave: nn.Module,
    example_inputs: Example = None,
    *,
    backends: Sequence[str] = ("onnxruntime",),
    batch: int | None = None,
    rounds: int = 30,
    progress: Progress | None = None,
    **settings: Any,
) -> list[Profile]:
    """Runs two networks in turn and gives what their operations take by the runtime's own clock.

    The clock costs a little itself; for latencies there is `bench`, whose arguments these are.

    Raises:
        BackendError: a backend is not installed, times no operations, or cannot run one of the networks.
    """
    for backend in backends:
        if backend not in TIMERS:
            raise BackendError(
                f"{backend} does not time its operations: the backends that do are {' and '.join(TIMERS)}"
            )
    chosen = [Settings(backend=backend, **settings).checked() for backend in backends]
    inputs = random_inputs(octave, example_inputs, batch)
    return [_profile((dense, octave), inputs, each, rounds, progress or (lambda _: None)) for each in chosen]


def _profile(
    networks: tuple[nn.Module, nn.Module], inputs: Sequence[Tensor], settings: Settings, rounds: int, say: Progress
) -> Profile:
    with threads(settings.threads), ExitStack() as stack:
        timers: list[Any] = []
        for name, network in zip(("dense", "octave"), networks, strict=True):
            say(f"{settings.backend}: preparing the {name} network")
            path, given = stack.enter_context(exported(network, inputs, settings.backend))
            timers.append(TIMERS[settings.backend](path, given, settings.threads))
        say(f"{settings.backend}: {rounds} pairs")
        for _ in range(WARMUP + rounds):
            for timer in timers:
                timer.run()
        dense, octave = (_medians(timer.calls()[WARMUP:]) for timer in timers)
    nothing = (0, 0.0)
    pairs = {kind: (dense.get(kind, nothing), octave.get(kind, nothing)) for kind in {**dense, **octave}}
    rows = [Kind(kind, ours[0], theirs[0], ours[1], theirs[1]) for kind, (ours, theirs) in pairs.items()]
    rows.sort(key=lambda row: (-row.octave_ms, -row.dense_ms))
    return Profile(settings.backend, tuple(rows), mac_ratio(*networks, inputs), rounds, asdict(settings))


WARMUP = 3


def _medians(calls: Sequence[Times]) -> dict[str, tuple[int, float]]:
    """How many operations of each kind a call has, and the median over calls of their ms."""
    found: dict[str, tuple[int, float]] = {}
    for kind in dict.fromkeys(kind for kind, _ in calls[0]):
        each = [[ms for name, ms in call if name == kind] for call in calls]
        found[kind] = (len(each[0]), statistics.median(map(sum, each)))
    return found


class _Onnx:
    """ONNX Runtime writes all operations of all calls into a file when it is asked to end."""

    def __init__(self, path: str, inputs: Sequence[Tensor], threads: int | None) -> None:
        self.session = onnx_session(path, threads, enable_profiling=True, profile_file_prefix=f"{path}.times")
        self.run: Callable[[], Any] = lambda: run_onnx(self.session)(*inputs)

    def calls(self) -> list[Times]:
        """What the operations of each call took."""
        events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
        found: list[Times] = []
        times: Times = []
        for event in sorted(events, key=lambda event: event.get("ts", 0) + event.get("dur", 0)):
            if event.get("name") == "model_run":
                found.append(times)
                times = []
            elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times.append((event["args"]["op_name"], event["dur"] / 1000))
        return found


class _OpenVino:
    """OpenVINO tells of the last call, once it is over."""

    def __init__(self, path: str, inputs: Sequence[Tensor], threads: int | None) -> None:
        self.request = openvino_request(path, threads, PERF_COUNT=True)
        self.inputs = inputs
        self.found: list[Times] = []

    def run(self) -> None:
        """Calls it once."""
        run_openvino(self.request)(*self.inputs)
        told = self.request.profiling_info
        ran = [info for info in told if info.status == info.Status.EXECUTED]
        self.found.append([(info.node_type, 1000 * info.real_time.total_seconds()) for info in ran])

    def calls(self) -> list[Times]:
        """What the operations of each call took."""
        return self.found


TIMERS: dict[str, Any] = {"onnxruntime": _Onnx, "openvino": _OpenVino}

__all__ = ["Kind", "Profile", "profile"]
