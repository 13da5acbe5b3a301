"""`bench`: a dense and an octave network side by side on this machine."""

from octify.bench.bundles import BundleTiming, Faster, only_faster, reach_latency
from octify.bench.compare import Comparison, bench, compare, mac_ratio
from octify.bench.latency import measure_latency
from octify.bench.profile import Profile, profile
from octify.bench.runners import Settings

__all__ = [
    "BundleTiming", "Comparison", "Faster", "Profile", "Settings", "bench", "compare", "mac_ratio", "measure_latency",
    "only_faster", "profile", "reach_latency",
]  # fmt: skip
