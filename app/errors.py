"""Every error that Diskless raises, by who can do something about it. There is no HTTP here: `api/errors.py` has the statuses.

DisklessError
├── SettingsError              the environment does not describe a service that can start
├── StorageError               bytes could not be read or written
│   ├── NotModified            the object still has the ETag the caller holds
│   ├── ObjectNotFound
│   ├── PreconditionFailed     If-Match / If-None-Match did not hold: somebody else was faster
│   ├── InvalidRange           the range asked for begins beyond the object's end
│   ├── StorageDenied          credentials or rights: trying again does not help
│   └── StorageUnavailable     network, time-out, throttling, server fault: trying again may help
├── BundleError                something in the bucket cannot be served
│   ├── InvalidName            a model name or a version label is not one
│   ├── InvalidIndex
│   ├── InvalidManifest
│   ├── ArtifactMissing
│   ├── DigestMismatch
│   ├── SealError              nobody whom this service trusts says that this version is right
│   │   └── SealMissing, InvalidSeal, ForeignSeal, SealBroken
│   ├── VersionMismatch        trained with another scikit-learn or numpy than is here
│   ├── NoRoom                 loading it would take more memory than there is
│   ├── LoadFailed             the bytes are not an object of the format they claim
│   │   ├── UntrustedType      the file mentions a class or function that is not trusted
│   │   ├── TooLarge           it becomes larger than it may
│   │   └── CompiledUnreadable only the compiled form is none for this release: the reference may serve
│   ├── CompanionFailed        a scaler, encoder or preprocessor is missing, broken or does not fit
│   ├── UnusableModel          loaded, but not something that predicts
│   └── GoldenMismatch         the golden rows did not come out
├── PublishError
│   ├── VersionExists
│   ├── PublishConflict        somebody else changed the index first
│   ├── UnknownVersion         the index has no such name, version or alias
│   ├── VersionInUse           an alias names it
│   ├── NothingToRollBackTo
│   ├── UnusableKey            the private key cannot be read or written
│   └── UnusableExamples
└── RequestError               one caller's request cannot be answered; `code` is what the wire says
    ├── InvalidJson, InvalidRequest, InvalidInput, RequestTooLarge, HeadersTooLarge, RequestTimeout
    ├── Unauthorized, Forbidden
    ├── ModelNotFound, ModelNotReady, BucketUnreadable
    ├── UnsupportedEncoding
    └── Overloaded, RateLimited, PredictionFailed, PredictionTimeout
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


class DisklessError(Exception):
    """Root of the tree. The message is a sentence for a person: what was expected and what came."""

    @classmethod
    def kind(cls) -> str:
        """Return the class's name as programs read it: `VersionExists` is `version_exists`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class SettingsError(DisklessError):
    """One line per setting that is missing or impossible, each with its remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class StorageError(DisklessError):
    """Bytes could not be read or written."""


class NotModified(StorageError):
    """The object still has the ETag that the caller holds."""


class ObjectNotFound(StorageError):
    """No object has this key."""


class PreconditionFailed(StorageError):
    """The object is not (or no longer) in the state that the caller required.

    `unsure` is set when an earlier attempt of the same write got no answer: that one may have been done, and overtaken.
    """

    unsure = False


class InvalidRange(StorageError):
    """The range begins at or beyond the end of the object."""


class StorageDenied(StorageError):
    """The credentials are wrong, or may not do this. Trying again does not help."""


class StorageUnavailable(StorageError):
    """The storage did not answer, or answered that it cannot now. Trying again may help."""


class BundleError(DisklessError):
    """Something in the bucket cannot be served."""


class InvalidName(BundleError):
    """A model name or version label that cannot be one."""


class InvalidIndex(BundleError):
    """The index is not one that this release can read."""


class InvalidManifest(BundleError):
    """The manifest is not one that this release can read, or belongs to something else."""


class ArtifactMissing(BundleError):
    """An object that the manifest or the listing names is not there."""


class DigestMismatch(BundleError):
    """Bytes differ from what the manifest recorded."""


class SealError(BundleError):
    """A version's seal does not say that somebody whom this service trusts published it."""


class SealMissing(SealError):
    """The version has no seal."""


class InvalidSeal(SealError):
    """The object in the seal's place is not a seal that this release can read."""


class ForeignSeal(SealError):
    """The seal was made with a key that is not trusted here."""


class SealBroken(SealError):
    """The signature is not one of a trusted key over these bytes: manifest or seal were altered, or belong elsewhere."""


class VersionMismatch(BundleError):
    """The model was trained with another scikit-learn or numpy than is here."""


class NoRoom(BundleError):
    """Loading the model would take more memory than is free."""


class LoadFailed(BundleError):
    """The bytes do not become an object."""


class UntrustedType(LoadFailed):
    """The file mentions a class or function that is not trusted."""


class TooLarge(LoadFailed):
    """The object becomes larger than it may, by what is free or by what a file of its size can rightly become."""


class CompiledUnreadable(LoadFailed):
    """The compiled form has the right digest, and is none that this release can read: the reference may serve."""


class CompanionFailed(BundleError):
    """A scaler, encoder or preprocessor is missing, broken, or does not fit its model."""


class UnusableModel(BundleError):
    """The object loaded, but it is nothing that predicts."""


class GoldenMismatch(BundleError):
    """The golden rows did not give the recorded answers."""


class PublishError(DisklessError):
    """A model could not be published."""


class VersionExists(PublishError):
    """The version label is taken."""


class PublishConflict(PublishError):
    """Somebody else moved the alias first, or the index changed under every attempt to change it."""


class UnknownVersion(PublishError):
    """The index has no such name, version or alias."""


class VersionInUse(PublishError):
    """An alias names the version that was to be unpublished."""


class NothingToRollBackTo(PublishError):
    """The alias never named another version that is still there."""


class UnusableKey(PublishError):
    """The private key cannot be read, is none, or cannot be written."""


class UnusableExamples(PublishError):
    """The examples cannot be read, or do not survive the way through JSON."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request's input: where (`instances[3].age`), what was expected, what came."""

    path: str
    expected: str
    got: str


class RequestError(DisklessError):
    """One caller's request cannot be answered; the service is well."""

    code: ClassVar[str] = "request_failed"
    violations: tuple[Violation, ...] = ()
    retry_after_seconds: int | None = None

    def body(self) -> dict[str, Any]:
        """Return the error as the wire gives it: `error`, `detail`, and `violations` where there are any."""
        body: dict[str, Any] = {"error": self.code, "detail": str(self)}
        if self.violations:
            body["violations"] = [asdict(violation) for violation in self.violations]
        return body


class InvalidJson(RequestError):
    """The body is not JSON."""

    code = "invalid_json"


class InvalidRequest(RequestError):
    """The body is JSON, but not a request."""

    code = "invalid_request"


class InvalidInput(RequestError):
    """The instances do not fit the model's signature."""

    code = "invalid_input"

    def __init__(self, detail: str, violations: Sequence[Violation] = ()) -> None:
        super().__init__(detail)
        self.violations = tuple(violations)


class RequestTooLarge(RequestError):
    """More bytes or more rows than one request may bring."""

    code = "request_too_large"


class HeadersTooLarge(RequestError):
    """More headers, or longer ones, than one request may bring."""

    code = "headers_too_large"


class RequestTimeout(RequestError):
    """The request did not arrive in time."""

    code = "request_timeout"


class Unauthorized(RequestError):
    """No key, or none that is known."""

    code = "unauthorized"


class Forbidden(RequestError):
    """A known key that may not do this."""

    code = "forbidden"


class UnsupportedEncoding(RequestError):
    """The body is compressed in a way that is not known here."""

    code = "unsupported_encoding"


class ModelNotFound(RequestError):
    """No such model, version or alias is served."""

    code = "model_not_found"


class ModelNotReady(RequestError):
    """The model is known, but cannot answer now."""

    code = "model_not_ready"

    def __init__(self, detail: str, retry_after_seconds: int = 5) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class BucketUnreadable(RequestError):
    """The bucket was to be looked at now, and could not be. What is served goes on."""

    code = "bucket_unreadable"
    retry_after_seconds = 5


class Overloaded(RequestError):
    """There is no room for the request: in the model's queue, in memory, or among the connections."""

    code = "overloaded"
    retry_after_seconds = 1


class RateLimited(RequestError):
    """The caller has sent more requests than its key may: at most `requests` in `seconds`."""

    code = "rate_limited"

    def __init__(self, requests: int, seconds: int, *, pause_seconds: int) -> None:
        period = "second" if seconds == 1 else f"{seconds} seconds"
        super().__init__(
            f"this key may send {requests} requests a {period}, and has sent them: try again in {pause_seconds} s"
        )
        self.requests = requests
        self.seconds = seconds
        self.retry_after_seconds = pause_seconds


class PredictionFailed(RequestError):
    """The model raised. The message is generic; the cause is in the log."""

    code = "prediction_failed"


class PredictionTimeout(RequestError):
    """No answer within the request's deadline."""

    code = "prediction_timeout"
