"""Every operation that a compiled model may name: importing this module declares them all."""

from app.compiled import (  # noqa: F401
    anomaly,
    bayes,
    categories,
    combined,
    labels,
    linear,
    neighbours,
    network,
    numeric,
    steps,
    text,
    trees,
)
