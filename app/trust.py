"""What is asked of a version before it is loaded: whose seal, which versions, which types, how much memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from app import memory, seal, versions
from app.errors import ForeignSeal, SealMissing
from app.names import ModelRef

MAX_GROWTH = 64  # times what is stored: the most that a load may take; compressed forests take 20
MIN_GROWTH_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Trust:
    """What the operator trusts and allows.

    `types` are full names (`shop.features.Ratios`) that files may mention beside those of the list. With `keys`, a seal
    must be right where there is one; with `require_seal`, there must be one, of these keys. `memory_limit_bytes` is a
    limit beside those that the platform sets.
    """

    types: frozenset[str] = frozenset()
    keys: seal.TrustedKeys = field(default_factory=seal.TrustedKeys)
    require_seal: bool = False
    version_policy: versions.Policy = "refuse"
    memory_limit_bytes: int | None = None

    @property
    def looks_at_seals(self) -> bool:
        """Whether a version's seal is to be read at all: without a key it says nothing."""
        return self.require_seal or len(self.keys) > 0

    def sealed_by(self, manifest: bytes, stored: bytes | None, label: str) -> str | None:
        """Return the name (or id) of the trusted key that sealed a manifest's bytes; None where none did, and none must.

        Raises `SealError`. A seal of a trusted key that is wrong is refused whatever the settings: somebody altered it.
        """
        try:
            return seal.verify(manifest, stored, self.keys, label)
        except (SealMissing, ForeignSeal):
            if self.require_seal:
                raise
            return None

    def allow_bare(self, ref: ModelRef) -> None:
        """Raise `SealMissing` for a model without a manifest where only sealed ones are allowed."""
        if self.require_seal:
            raise SealMissing(
                f"{ref}: is a bare model, which nothing can seal, and this service wants a seal: "
                "publish it with --seal-key"
            )

    def bytes_for(self, size: int) -> int:
        """Return the most that a load of `size` stored bytes may take now: what is free, and at most `most_for`."""
        room = memory.room(self.memory_limit_bytes)
        return self.most_for(size) if room is None else min(self.most_for(size), room.free_bytes)

    def most_for(self, size: int) -> int:
        """Return the most that `size` stored bytes can rightly become."""
        return max(MIN_GROWTH_BYTES, MAX_GROWTH * size)
