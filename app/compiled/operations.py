"""Every operation that a compiled model may name: importing this module declares them all."""

from app.compiled import anomaly, labels, steps, trees  # noqa: F401
