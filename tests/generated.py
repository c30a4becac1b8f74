"""How tests with generated input run: the same input each time, and no more of it than there is time for."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings


def generated(examples: int) -> settings:
    """Return settings for so many examples. A failure is not made smaller: that takes a thousand predictions."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
