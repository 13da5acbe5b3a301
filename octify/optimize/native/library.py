"""The compiled kernels: built once for a machine and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ALIGN = 16  # floats
SOURCES = tuple(sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h")))
SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# What not every compiler knows; the first set that it takes is used.
TRIES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
TIMEOUT = 600.0


class Library:
    """The kernels as functions; `wide` is how many output channels a panel of weights holds."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        loaded.octify_wide.restype = ctypes.c_int64
        self.wide: int = loaded.octify_wide()
        self.run = loaded.octify_run
        self.run.restype = None
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self._enlarge_pages = loaded.octify_enlarge_pages
        self._enlarge_pages.restype = None
        self._enlarge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]

    def room(self, count: int) -> Tensor:
        """Memory for so many numbers, where vectors can be loaded from; in large pages if there are such."""
        room = torch.empty(count + ALIGN)
        self._enlarge_pages(room.data_ptr(), 4 * (count + ALIGN))
        start = -room.data_ptr() // 4 % ALIGN
        return room[start : start + count]


def load_library() -> Library | None:
    """The kernels, compiled now if this machine has not done so before; None where that cannot be done."""
    return _load()[0]


def why_not() -> str:
    """Why there are no kernels here, or ""."""
    return _load()[1]


@cache
def _load() -> tuple[Library | None, str]:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        return None, "no C++ compiler (g++, clang++, or $CXX)"
    path = _cache() / f"kernels-{_key(compiler)}.so"
    try:
        if not path.is_file():
            _build(compiler, path)
        return Library(path), ""
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler} cannot build octify's kernels: {error}"


def _cache() -> Path:
    """$OCTIFY_CACHE, or ~/.cache/octify."""
    given = os.environ.get("OCTIFY_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "octify"


def _key(compiler: str) -> str:
    """Changes with the source, the compiler and the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    parts = (*(path.read_text() for path in SOURCES), compiler, platform.machine(), processor, *FLAGS)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, path: Path) -> None:
    """Compiles beside the target, then renames: two processes may do so at once.

    Raises:
        OSError: the folder cannot be written.
        subprocess.SubprocessError: the compiler refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kernels.", dir=path.parent) as folder:
        draft = Path(folder, path.name)
        for index, extra in enumerate(TRIES):
            command = [*compiler.split(), *FLAGS, *extra, str(SOURCE), "-o", str(draft)]
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=index == len(TRIES) - 1)
            if done.returncode == 0:
                break
        draft.replace(path)
