"""Every operation that a compiled model may name: importing this module declares them all."""

from app.compiled import steps  # noqa: F401
