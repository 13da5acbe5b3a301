"""What all tests share: one thread a process, hypothesis' examples the same on every run, faults that are raised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from octify import flows

torch.set_num_threads(1)

settings.register_profile(
    "octify",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("octify")


@pytest.fixture(autouse=True)
def faults_of_rules_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's network goes on without a rule that fails; a test does not."""
    monkeypatch.setattr(flows, "FAULTS", ())
