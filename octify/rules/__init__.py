"""The families of rules; importing this package registers them all."""

from octify.rules import channels, conv, join, norm, pool, resize
from octify.rules.base import register, rule_for, rule_of_type

FAMILIES = (channels, conv, join, norm, pool, resize)

__all__ = ["FAMILIES", "register", "rule_for", "rule_of_type"]
