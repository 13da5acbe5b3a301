"""octify: turns any PyTorch CNN into an Octave-convolution CNN."""

from octify.checkpoint import load, save
from octify.convert import convert, plan, plan_of
from octify.export import export
from octify.layers import Merge, OctConv1d, OctConv2d, OctConv3d, Split
from octify.layout import Layout
from octify.optimize import optimize
from octify.plan import Plan
from octify.recipe import Recipe, load_recipe
from octify.rules.base import Bands, Rule, register
from octify.version import __version__

__all__ = [
    "Bands", "Layout", "Merge", "OctConv1d", "OctConv2d", "OctConv3d", "Plan", "Recipe", "Rule", "Split", "__version__",
    "convert", "export", "load", "load_recipe", "optimize", "plan", "plan_of", "register", "save",
]  # fmt: skip
