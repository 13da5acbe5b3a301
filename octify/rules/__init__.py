"""The families of rules; importing this package registers them all."""

from octify.rules import (
    bandnorm,
    channels,
    conv,
    join,
    linear,
    norm,
    pad,
    pixels,
    pool,
    resize,
    stack,
    transposed,
    views,
)
from octify.rules.base import register, rule_for, rule_of_type

FAMILIES = (bandnorm, channels, conv, join, linear, norm, pad, pixels, pool, resize, stack, transposed, views)

__all__ = ["FAMILIES", "register", "rule_for", "rule_of_type"]
