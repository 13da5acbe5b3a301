"""`bench`: a dense and an octave network side by side on this machine."""

from octify.bench.compare import Comparison, bench, compare
from octify.bench.runners import Settings

__all__ = ["Comparison", "Settings", "bench", "compare"]
