"""octify's own kernels for float32 networks on a CPU, compiled on the machine that runs them."""

from octify.optimize.native.library import load_library, why_not
from octify.optimize.native.lower import lower_native
from octify.optimize.native.program import Program, release_all

__all__ = ["Program", "load_library", "lower_native", "release_all", "why_not"]
