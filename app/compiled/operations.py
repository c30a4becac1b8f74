"""Every operation that a compiled model may name: importing this module declares them all."""

from app.compiled import categories, linear, numeric, steps  # noqa: F401
