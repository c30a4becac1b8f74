"""The seal of a manifest: a signature that says whose key published it, checked before anything of a version is trusted.

A manifest pins its artifacts by digest and says which version it is, so one signature over its stored bytes seals them all.
It is Ed25519 (RFC 8032) over `PREFIX` and those bytes: a key's signature under anything else is no seal, and a seal is
valid for nothing else.

Keys are 32 bytes, written `diskless-private-…` and `diskless-public-…`: in base64url without padding, so that one can be
pasted into an environment variable as it is. Only the public ones belong on a server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from app.errors import ForeignSeal, InvalidSeal, SealBroken, SealMissing
from app.names import NAME

FORMAT = 1
ALGORITHM = "ed25519"
PREFIX = b"diskless manifest seal 1\n"
PRIVATE = "diskless-private-"
PUBLIC = "diskless-public-"
KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_SEAL_BYTES = 1024  # nothing longer is looked at
MAX_SHOWN = 60  # characters of a public text that an error shows; of what may be a private key, none are

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*\Z")
_KEY_ID = re.compile(r"[0-9a-f]{16}\Z")

# Of the curve -x² + y² = 1 + dx²y² over the integers modulo P (RFC 8032, section 5.1).
_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P
# The y of the eight points whose order divides the cofactor 8: under such a key anybody can make a valid signature.
_WEAK_Y = {
    0,  # 32 zero bytes, "AAA…" in base64, are such a key
    1,
    _P - 1,
    0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
}


@dataclass(frozen=True, slots=True)
class PublicKey:
    """What a seal is checked with. Raises `ValueError` when the 32 bytes are no key that a signature could prove anything by."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES or not _is_strong(self.raw):
            raise ValueError("expected a public key, got bytes that are none: copy it again")

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of its SHA-256: enough to tell keys apart; it proves nothing."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def __str__(self) -> str:
        return PUBLIC + _text(self.raw)


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """What a seal is made with. Its bytes are in no representation of it."""

    raw: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ValueError(f"expected a private key of {KEY_BYTES} bytes, got {len(self.raw)}")


@dataclass(frozen=True, slots=True)
class TrustedKeys:
    """The public keys whose seals are accepted, by id, each with the name that it was given, if any."""

    keys: dict[str, tuple[PublicKey, str | None]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        """Yield each key as a person knows it: `ci (0123456789abcdef)`, or its id alone."""
        return (f"{name} ({key.id})" if name else key.id for key, name in self.keys.values())

    def __len__(self) -> int:
        return len(self.keys)


def keygen() -> tuple[str, str]:
    """Return a new private key and its public key, in their text forms."""
    private = PrivateKey(secrets.token_bytes(KEY_BYTES))
    return PRIVATE + _text(private.raw), str(public_key_of(private))


def read_private_key(text: str) -> PrivateKey:
    """Read the text form of a private key. Raises `ValueError` with a sentence that shows nothing of the text."""
    text = text.strip()
    if text.startswith(PUBLIC):
        raise ValueError(f"expected a private key, got a public one: take the one that begins with {PRIVATE}")
    return PrivateKey(_bytes(text, PRIVATE, f"expected a private key as `python -m app keygen` prints it, {PRIVATE}…"))


def read_public_key(text: str) -> PublicKey:
    """Read the text form of a public key. Raises `ValueError` with a sentence."""
    text = text.strip()
    if PRIVATE in text:
        raise ValueError(
            f"expected public keys, got a private one, which no server should have: set {PUBLIC}…, which "
            "`python -m app keygen` printed with it, and replace the pair if others can read this"
        )
    shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
    raw = _bytes(text, PUBLIC, f"expected a public key as `python -m app keygen` prints it, {PUBLIC}…, got {shown!r}")
    try:
        return PublicKey(raw)
    except ValueError as error:
        raise ValueError(f"{error}: {shown!r}") from None


def public_key_of(private: PrivateKey) -> PublicKey:
    """Return the public key that belongs to a private one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return PublicKey(Ed25519PrivateKey.from_private_bytes(private.raw).public_key().public_bytes_raw())


def parse_trusted_keys(text: str) -> TrustedKeys:
    """Read `KEY,KEY` or `ci:KEY,ann:KEY`: public keys, each with a name or without. An empty text trusts nobody.

    Raises `ValueError` with a sentence.
    """
    keys: dict[str, tuple[PublicKey, str | None]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, key_text = part.rpartition(":")
        key = read_public_key(key_text)
        if colon and not NAME.match(name):
            raise ValueError(
                f"expected NAME:KEY with a name of letters, digits, '.', '_' or '-', got the name {name[:MAX_SHOWN]!r}"
            )
        if key.id in keys:
            raise ValueError(f"expected each key once, got {key.id} twice: remove one of the two")
        if name and name in {other for _, other in keys.values()}:
            raise ValueError(f"expected each name once, got {name!r} for two keys: rename one of the two")
        keys[key.id] = (key, name or None)
    return TrustedKeys(keys)


def seal(manifest: bytes, private: PrivateKey) -> bytes:
    """Return the seal of a manifest's stored bytes, as it is stored beside it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signature = Ed25519PrivateKey.from_private_bytes(private.raw).sign(PREFIX + manifest)
    return _encode(public_key_of(private).id, signature)


def verify(manifest: bytes, stored: bytes | None, trusted: TrustedKeys, label: str) -> str:
    """Check the seal `stored` beside a manifest's stored bytes; return the name, or the id, of the key that made it.

    `label` names the version in errors. Raises `SealMissing` (`stored` is None), `InvalidSeal`, `ForeignSeal`,
    `SealBroken`.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if stored is None:
        raise SealMissing(f"{label}: has no seal, and this service wants one: publish it with --seal-key")
    key_id, signature = _decode(stored, label)
    if key_id not in trusted.keys:
        raise ForeignSeal(
            f"{label}: was sealed with key {key_id}, trusted are {_listed(trusted)}: "
            "publish it with a trusted key, or add its public key to ML_TRUSTED_KEYS"
        )
    key, name = trusted.keys[key_id]
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, PREFIX + manifest)
    except InvalidSignature as error:
        raise SealBroken(
            f"{label}: its seal, of key {name or key_id}, is not of this manifest: one of the two was altered or "
            "exchanged after sealing; find out by whom, and publish the model again"
        ) from error
    return name or key_id


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _encode(key_id: str, signature: bytes) -> bytes:
    fields = {"format": FORMAT, "algorithm": ALGORITHM, "key": key_id, "signature": _text(signature)}
    return json.dumps(fields, indent=1).encode("ascii")


def _decode(stored: bytes, label: str) -> tuple[str, bytes]:
    """Return the key id and the signature. Only the very bytes that `seal` writes are a seal: there is one way to write it."""
    if len(stored) > MAX_SEAL_BYTES:
        raise InvalidSeal(f"{label}: its seal has {len(stored)} bytes, expected at most {MAX_SEAL_BYTES}")
    try:
        fields: Any = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise InvalidSeal(f"{label}: its seal is not JSON: publish the model again") from error
    if not isinstance(fields, dict):
        raise InvalidSeal(f"{label}: its seal is not an object with format, algorithm, key and signature")
    number = fields.get("format")
    if type(number) is int and number > FORMAT:
        raise InvalidSeal(f"{label}: its seal has format {number}, this release reads {FORMAT}: upgrade Diskless")
    key_id, text = fields.get("key"), fields.get("signature")
    if isinstance(key_id, str) and _KEY_ID.match(key_id) and isinstance(text, str):
        signature = _decoded(text, SIGNATURE_BYTES)
        if signature is not None and _encode(key_id, signature) == stored:
            return key_id, signature
    raise InvalidSeal(
        f"{label}: its seal is not as this release writes it: it was altered, or written by something else"
    )


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _decoded(text: str, size: int) -> bytes | None:
    """Return the `size` bytes that `_text` would write as `text`, None when there are none."""
    if not _BASE64URL.match(text) or len(text) != -(-size * 4 // 3):
        return None
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return raw if _text(raw) == text else None  # the last digit has bits that no byte needs


def _bytes(text: str, prefix: str, problem: str) -> bytes:
    raw = _decoded(text.removeprefix(prefix), KEY_BYTES) if text.startswith(prefix) else None
    if raw is None:
        raise ValueError(problem)
    return raw


def _is_strong(raw: bytes) -> bool:
    """Whether 32 bytes are a point of the curve, written in the one way to write it, that is not of small order."""
    y = int.from_bytes(raw, "little") & (1 << 255) - 1
    if y >= _P or y in _WEAK_Y:
        return False
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    return pow(square, (_P - 1) // 2, _P) == 1  # Euler's criterion: it is the square of some x
