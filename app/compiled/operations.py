"""Every operation that a compiled model may name: importing this module declares them all."""

from app.compiled import (  # noqa: F401
    bayes,
    categories,
    combined,
    linear,
    neighbours,
    network,
    numeric,
    steps,
    text,
)
