"""What one version of a model consists of: its reference, its artifacts with their digests, and the manifest that lists them.

The format is described in docs/bundle-format.md; `FORMAT` is its number. Old formats keep loading.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.errors import InvalidManifest
from app.memory import Taken
from app.names import NAME, ModelRef, shortened
from app.signature import Signature

FORMAT = 1
CHUNK_BYTES = 4 * 1024 * 1024
MIN_CHUNK_BYTES = 4096
MAX_REASON = 500  # characters of one that the status shows; of a longer one, so many are kept
MAX_MANIFEST_BYTES = 8 << 20  # golden rows of 512 KiB, a hundred thousand columns, the digests of 400 GB


COMPILED = "compiled"  # the role of the compiled form
PROGRAM_FORMAT = "safetensors"  # of its artifact

_Word = Annotated[str, Field(max_length=100)]  # what comes back in messages
_Reason = Annotated[str, AfterValidator(lambda text: shortened(text, MAX_REASON))]
_Rows = Annotated[int, Field(ge=0, le=1 << 40)]
_Microseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Digest = Annotated[str, Field(max_length=64)]


class Artifact(BaseModel):
    """One object of a bundle: what it is for, where it lies beside the manifest, and the digests its bytes must have."""

    model_config = ConfigDict(frozen=True)

    role: _Word
    path: str = Field(max_length=500)
    format: _Word
    size: int = Field(ge=0, description="bytes")
    sha256: _Digest
    # Chunks are held in memory several at a time: whoever wrote the manifest must not decide how much that is.
    chunk_bytes: int = Field(default=CHUNK_BYTES, ge=MIN_CHUNK_BYTES, le=CHUNK_BYTES)
    chunks: tuple[_Digest, ...] = Field(default=(), description="SHA-256 of every run of `chunk_bytes` bytes")

    @classmethod
    def of(cls, body: bytes, *, role: str, path: str, format: str) -> Artifact:
        """Describe `body`: its size, its SHA-256, and that of each chunk."""
        view = memoryview(body)
        chunks = tuple(
            hashlib.sha256(view[start : start + CHUNK_BYTES]).hexdigest() for start in range(0, len(view), CHUNK_BYTES)
        )
        whole = hashlib.sha256(view).hexdigest()
        return cls(role=role, path=path, format=format, size=len(view), sha256=whole, chunks=chunks)


class Golden(BaseModel):
    """Recorded inputs, as `instances` of a request, and the answers of each method to them, as the wire gives them."""

    model_config = ConfigDict(frozen=True)

    instances: list[Any]
    outputs: dict[str, list[Any]]


class Speeds(BaseModel):
    """Microseconds per row, by how many rows are computed at once: of scikit-learn, and of the compiled form."""

    model_config = ConfigDict(frozen=True)

    reference: dict[_Rows, _Microseconds] = Field(default_factory=dict)
    compiled: dict[_Rows, _Microseconds] = Field(default_factory=dict)


class Compiled(BaseModel):
    """What is known of a compiled form: what it covers, how it was proved, what it costs."""

    model_config = ConfigDict(frozen=True)

    format: int = Field(description="of the program in the artifact of role `compiled`")
    methods: tuple[_Word, ...]
    operations: tuple[_Word, ...] = Field(default=(), description="kinds of operations that it is made of")
    parity: float = Field(ge=0, description="largest relative difference from scikit-learn that was found")
    rows: int = Field(ge=0, description="rows that were compared")
    reason: _Reason | None = Field(default=None, description="why methods are missing")
    microseconds_per_row: Speeds = Field(default_factory=Speeds)
    resident_bytes: int | None = Field(default=None, ge=0, description="what loading it takes, afterwards")
    peak_bytes: int | None = Field(default=None, ge=0, description="what loading it takes, at its worst moment")
    compiled_with: dict[_Word, _Word] = Field(default_factory=dict, description="versions of the libraries")

    @property
    def memory(self) -> Taken | None:
        """What loading it was measured to take; None where nothing was measured."""
        if self.resident_bytes is None or self.peak_bytes is None:
            return None
        return Taken(self.resident_bytes, max(self.resident_bytes, self.peak_bytes))

    def faster_from(self) -> list[tuple[int, bool]]:
        """Return from how many rows on the compiled form is faster, or is not: the first pair is for one row.

        Between two sizes that were measured, the change is where straight lines through the logarithms cross.
        """
        both = self.microseconds_per_row
        sizes = sorted(both.reference.keys() & both.compiled.keys())
        gains = [
            (math.log(size), math.log(max(both.reference[size], 1e-9) / max(both.compiled[size], 1e-9)))
            for size in sizes
        ]
        if not gains:
            return [(1, True)]
        found = [(1, gains[0][1] >= 0)]
        for (left, before), (right, after) in itertools.pairwise(gains):
            if (before >= 0) != (after >= 0):
                crossing = left + (right - left) * before / (before - after)
                found.append((math.ceil(math.exp(crossing)), after >= 0))
        return found


class Manifest(BaseModel):
    """One version of a model as it is stored. Fields that a later release adds are kept out of the way, not refused."""

    model_config = ConfigDict(frozen=True)

    format: int
    name: _Word
    version: _Word
    created: str = Field(description="ISO 8601, UTC")
    artifacts: tuple[Artifact, ...]
    signature: Signature
    golden: Golden | None = None
    trained_with: dict[_Word, _Word] = Field(default_factory=dict, description="versions of Python and the libraries")
    resident_bytes: int | None = Field(default=None, ge=0, description="what loading takes, afterwards")
    peak_bytes: int | None = Field(default=None, ge=0, description="what loading takes, at its worst moment")
    compiled: Compiled | None = None
    not_compiled: _Reason | None = Field(default=None, description="why there is no compiled form")

    @property
    def program(self) -> Artifact | None:
        """The artifact of the compiled form; None where there is none, or nothing is said of it."""
        if self.compiled is None:
            return None
        return next((artifact for artifact in self.artifacts if artifact.role == COMPILED), None)

    @property
    def memory(self) -> Taken | None:
        """What its publisher measured a load to take, beyond the libraries; None where nothing was measured."""
        if self.resident_bytes is None or self.peak_bytes is None:
            return None
        return Taken(self.resident_bytes, max(self.resident_bytes, self.peak_bytes))

    @property
    def ref(self) -> ModelRef:
        """Name and version together."""
        return ModelRef(self.name, self.version)

    def encode(self) -> bytes:
        """Return the manifest's bytes, as they are stored and sealed."""
        return self.model_dump_json(indent=1, exclude_none=True).encode()

    @classmethod
    def decode(cls, body: bytes, ref: ModelRef) -> Manifest:
        """Read the manifest of `ref`. Raises `InvalidManifest` when it is not one, or is another version's."""
        if len(body) > MAX_MANIFEST_BYTES:
            raise InvalidManifest(
                f"{ref}: manifest.json is not a manifest: it has more than {MAX_MANIFEST_BYTES:,} bytes"
            )
        try:
            manifest = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise InvalidManifest(
                f"{ref}: manifest.json is not a manifest: {where:.200}: {first['msg']:.300}"
            ) from error
        if manifest.format > FORMAT:
            raise InvalidManifest(
                f"{ref}: manifest.json has format {manifest.format}, this release reads up to {FORMAT}: upgrade Diskless"
            )
        if manifest.ref != ref:
            raise InvalidManifest(f"{ref}: manifest.json there belongs to {manifest.ref}")
        roles = [artifact.role for artifact in manifest.artifacts]
        if roles.count("model") != 1 or len(set(roles)) != len(roles):
            raise InvalidManifest(f"{ref}: manifest.json must list one model and each role once, lists {roles!s:.200}")
        for artifact in manifest.artifacts:
            _check_artifact(artifact, ref)
        return manifest


def _check_artifact(artifact: Artifact, ref: ModelRef) -> None:
    parts = artifact.path.split("/")
    if not all(NAME.match(part) for part in parts):
        raise InvalidManifest(f"{ref}: artifact path {artifact.path!r:.100} leaves its version's folder or is no path")
    expected = -(-artifact.size // artifact.chunk_bytes)
    if artifact.chunks and len(artifact.chunks) != expected:
        raise InvalidManifest(
            f"{ref} {artifact.path}: {artifact.size} bytes are {expected} chunks, the manifest lists {len(artifact.chunks)}"
        )
