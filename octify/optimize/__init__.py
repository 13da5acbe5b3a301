"""`optimize`: an inference form of a converted (or dense) network with the same outputs, for one backend."""

from octify.optimize.build import BACKENDS, Optimized, flatten, optimize

__all__ = ["BACKENDS", "Optimized", "flatten", "optimize"]
