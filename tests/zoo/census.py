"""The census: every network of torchvision and timm through octify, one row each.

`make zoo`, or `python -m tests.zoo.census --only 'timm:resne*' --fresh`. Rows that the file has already are kept, so
that a run can be stopped and taken up again, but for those that time or memory cut short; --fresh measures all again.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import gc
import json
import queue
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import timm.models
import torchvision.models
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from octify.zoo import list_models
from tests.zoo.row import COVERAGE, LARGE, OTHERS, TOO_LARGE, Row, read_rows, write_rows
from tests.zoo.summary import write_summary

SECONDS, GIB, LIFE = 240.0, 10, 150  # a network's bounds; networks in the life of a worker
DIED = "the worker died, most likely out of memory"
DONE = "done\n"  # behind a row's last line
PARAMETERS = 80e6  # for each GiB: three copies, and something to spare


def family_of(name: str) -> str:
    """The library's file that a network comes from."""
    library, short = name.split(":")
    models: Any = timm.models if library == "timm" else torchvision.models
    entry = models.model_entrypoint(short) if library == "timm" else models.get_model_builder(short)
    return entry.__module__.removeprefix("torchvision.models.").removeprefix("timm.models.")


def in_turns(names: list[str]) -> list[str]:
    """One network of every family, then the second of each: what fails shows early."""
    families: dict[tuple[str, str], list[str]] = {}
    for name in names:
        families.setdefault((name.split(":")[0], family_of(name)), []).append(name)
    return [name for turn in zip_longest(*families.values()) for name in turn if name is not None]


class _Worker:
    """A process that measures one network after another; a new one takes its place when it dies."""

    def __init__(self, seconds: float, gib: int) -> None:
        self.seconds, self.gib = seconds, gib
        self.process: subprocess.Popen[str] | None = None
        self.served = 0

    def measure(self, name: str) -> Row:
        """The row of a network, or one that says which bound it met; where memory was short, a new process tries."""
        row = self._measure(name)
        if self.served > 1 and any(word in row.reason for word in ("allocate memory", DIED)):
            self.stop()
            return self._measure(name)
        return row

    def _measure(self, name: str) -> Row:
        if self.process is None or self.process.poll() is not None or self.served >= LIFE:
            self._start()
        process = cast("subprocess.Popen[str]", self.process)
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self.seconds, process.kill)
        timer.start()
        line, lines = "", list[str]()  # the row before its oracles, and the whole
        with suppress(OSError):
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            while (line := process.stdout.readline()) and line != DONE:
                lines.append(line)
        whole, late = bool(line), timer.finished.is_set()
        timer.cancel()
        self.served += 1
        library, short = name.split(":")
        row = Row(**json.loads(lines[-1])) if lines else Row(library, short, family_of(name))
        why = f"more than {self.seconds:g} s" if late else DIED
        if not whole:
            row.say(*(("oracles", f"not run, {why}") if lines else ("census", why)))
        return row

    def _start(self) -> None:
        self.stop()
        command = [sys.executable, "-m", "tests.zoo.census", "--worker", "--gib", str(self.gib)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.served = 0

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _serve(gib: int) -> None:
    """Reads names, writes rows."""
    import torch

    from tests.zoo.measure import measure

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # the libraries: what is made from now on is looked through in less time
    gc.disable()
    resource.setrlimit(resource.RLIMIT_DATA, (gib * 2**30, gib * 2**30))
    out = sys.stdout
    sys.stdout = sys.stderr

    def tell(row: Row, end: str = "") -> None:
        out.write(f"{json.dumps(asdict(row))}\n{end}")
        out.flush()

    trim = _trimmer()
    waiting = 0.0  # parameters of the networks since the last collection: converted models hold cycles
    for line in sys.stdin:
        name = line.strip()
        row = measure(name, family_of(name), gib * PARAMETERS, tell)
        tell(row, DONE)
        waiting += float(row.parameters or LARGE)
        if waiting >= LARGE:
            gc.collect()
            trim()
            waiting = 0.0


def _trimmer() -> Callable[[], object]:
    """Gives the memory between small pieces back: else what a worker holds grows until nothing large fits its bound."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda: trim(0)) if trim is not None else (lambda: None)


def _measured(names: list[str], workers: int, seconds: float, gib: int) -> Iterator[Row]:
    """Rows as they come."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Row] = queue.SimpleQueue()
    for name in names:
        todo.put(name)

    def work() -> None:
        worker = _Worker(seconds, gib)
        try:
            while True:
                done.put(worker.measure(todo.get_nowait()))
        except queue.Empty:
            worker.stop()

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    for _ in names:
        yield done.get()


def main() -> None:
    """Measures what is missing and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="a glob over full names, such as 'timm:resne*'")
    parser.add_argument("--names", help="a file of full names, one a line, measured in this order")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a network's time bound")
    parser.add_argument("--gib", type=int, default=GIB, help="a worker's memory bound; more measures larger networks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return _serve(given.gib)
    listed = Path(given.names).read_text().split() if given.names else list_models()
    rows = {**read_rows(COVERAGE), **read_rows(OTHERS)}
    wanted = [name for name in listed if fnmatch.fnmatchcase(name, given.only)]
    kept = {name for name, row in rows.items() if row.is_whole}
    left = [name for name in wanted if given.fresh or name not in kept]
    names = left if given.names else in_turns(left)
    _run(names, rows, given.workers, given.seconds, given.gib)
    large = [name for name in names if TOO_LARGE in rows[name].reason]
    if given.workers > 1:  # one at a time, in the memory of all workers
        _run(large, rows, 1, given.workers * given.seconds, given.workers * given.gib)
    write_summary(list(read_rows(COVERAGE).values()))
    return None


def _run(names: list[str], rows: dict[str, Row], workers: int, seconds: float, gib: int) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("census", total=len(names))
        for row in _measured(names, workers, seconds, gib):
            rows[row.key] = row
            progress.update(task, advance=1, description=row.key)
            _save(rows)


def _save(rows: dict[str, Row]) -> None:
    """CNNs with all their columns; the others with their share of convolutions; what failed before that is a CNN's."""
    cnn, others = list[Row](), list[Row]()
    for row in rows.values():
        (cnn if row.is_cnn or not row.convolution_share else others).append(row)
    write_rows(COVERAGE, cnn)
    write_rows(OTHERS, others)


if __name__ == "__main__":
    main()
