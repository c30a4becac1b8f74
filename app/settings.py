"""Every setting, read once from the environment and `.env`, and turned into a value that can be trusted from then on.

The README's table is held against this file by a test. Nothing else in `app/` reads the environment,
except that the doctor asks for proxies and certificates as botocore does.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, override
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from annotated_types import Ge, Gt, Le
from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app import keys, seal
from app.errors import InvalidName, SettingsError
from app.limits import Limits
from app.names import COMPANION_ROLES, check_name, shortened
from app.rates import Rate
from app.trust import Trust

R2_HOST = ".r2.cloudflarestorage.com"
BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
HOST_LABEL = re.compile(r"[A-Za-z0-9-]{1,63}")
HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9a-f:.]+")  # a name or an IPv4 address; an IPv6 address without its brackets
ORIGIN = re.compile(r"(https?)://(?:[a-z0-9.-]{1,253}|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?")
USUAL_PORTS = {"http": ":80", "https": ":443"}  # which browsers leave out
ALLOWED_HOST = re.compile(r"(\*\.)?[a-z0-9._-]{1,253}|\[[0-9a-f:.]+\]")
HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
TRACES_PATH = "/v1/traces"  # behind the base URL of a collector
VISIBLE_ASCII = re.compile(r"[!-~]+")
MAX_WORKERS = 256
OURS = ("ML_", "R2_")  # what begins so is meant for this service
MAX_SHOWN = 60  # characters of a value that an error line shows
KEYS_MISSING = (
    "ML_API_KEYS is missing: {why}, so set a key for each caller, as in ann:SECRET, made with "
    "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
)
R2_KEYS = ("R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY")
AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Mode(enum.StrEnum):
    """Where models come from, and what becomes of a local copy."""

    CLOUD_ONLY = "cloud-only"  # R2 only; nothing is written to disk
    R2_WITH_COPY = "r2-with-copy"  # the local copy when its digest is the one wanted, else R2
    R2_FORCED = "r2-forced"  # R2 always; the local copy is written, never read
    LOCAL = "local"  # a directory is the store


def _name(name: str) -> str:
    try:
        return check_name("the name", name)
    except InvalidName as error:
        raise ValueError(str(error)) from error


def _names(value: Any) -> Any:
    """Split `a, b` into a tuple of checked names."""
    if not isinstance(value, str):
        return value
    return tuple(dict.fromkeys(_name(part.strip()) for part in value.split(",") if part.strip()))


def _companions(value: Any) -> Any:
    """Split `fraud:scaler,churn:encoder` into a name's required roles."""
    if not isinstance(value, str):
        return value
    wanted: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, colon, role = part.partition(":")
        if not colon or role not in COMPANION_ROLES:
            raise ValueError(f"expected NAME:ROLE with a role of {', '.join(COMPANION_ROLES)}, got {part!r}")
        wanted[_name(name)] = tuple(dict.fromkeys((*wanted.get(name, ()), role)))
    return wanted


def _types(value: Any) -> Any:
    """Split `shop.features.Ratios, shop.text.Words` into a set of full names."""
    if not isinstance(value, str):
        return value
    names = [part for part in re.split(r"[,\s]+", value) if part]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
            raise ValueError(
                "expected full names of classes and functions, as in shop.features.Ratios (no wildcards: "
                f"each is a name of its own), got {_shown(name)}"
            )
    return frozenset(names)


def _origins(value: Any) -> Any:
    """Split `https://app.example.org, https://example.org` into origins as browsers write them, or take `*` alone."""
    if not isinstance(value, str):
        return value
    parts = tuple(dict.fromkeys(part.strip().lower() for part in value.split(",") if part.strip()))
    for part in parts if parts != ("*",) else ():
        origin = ORIGIN.fullmatch(part)
        if origin is None or origin[2] == USUAL_PORTS[origin[1]]:
            raise ValueError(
                "expected origins as browsers write them, https://app.example.org or http://localhost:3000, without a path "
                f"and without the usual port, or * alone, got {_shown(part)}"
            )
    return parts


def _hosts(value: Any) -> Any:
    """Split `api.example.org, *.example.org` into hosts."""
    if not isinstance(value, str):
        return value
    parts = tuple(dict.fromkeys(part.strip().lower() for part in value.split(",") if part.strip()))
    for part in parts:
        if not ALLOWED_HOST.fullmatch(part):
            raise ValueError(
                "expected names as in api.example.org or *.example.org, or addresses, each without http:// and port "
                f"(unset: any host), got {_shown(part)}"
            )
    return parts


def _keys(value: Any) -> Any:
    return seal.parse_trusted_keys(value) if isinstance(value, str) else value


def _caller_keys(kind: str) -> Any:
    return BeforeValidator(lambda value: keys.parse(value, kind) if isinstance(value, str) else value)


def _rate(value: Any) -> Any:
    return Rate.parse(value) if isinstance(value, str) else value


CallerKeys = Annotated[tuple[keys.Key, ...], NoDecode, _caller_keys("key")]
AdminKeys = Annotated[tuple[keys.Key, ...], NoDecode, _caller_keys("admin")]
Types = Annotated[frozenset[str], NoDecode, BeforeValidator(_types)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]
Hosts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_hosts)]
Keys = Annotated[seal.TrustedKeys, NoDecode, BeforeValidator(_keys)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
Companions = Annotated[dict[str, tuple[str, ...]], NoDecode, BeforeValidator(_companions)]


def _env(*names: str, **field: Any) -> Any:
    """Declare a setting under the first of `names`; the others are read where it is not set."""
    return Field(validation_alias=AliasChoices(*names), **field)


class _Variables(PydanticBaseSettingsSource):
    """The environment, and `.env` for the variables that it lacks, under the names that were used.

    pydantic-settings would let any name in the environment win over any in `.env`: the AWS key of a developer's shell
    over the R2 key of the project.
    """

    def __init__(self, settings: type[BaseSettings], found: Mapping[str, str | None]) -> None:
        super().__init__(settings)
        self._found = {name.upper(): (value or "").strip() for name, value in found.items()}

    @override
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not asked: `__call__` returns everything at once."""
        raise NotImplementedError

    @override
    def __call__(self) -> dict[str, Any]:
        """Return the values that are not empty, without blanks around them.

        A machine may have AWS keys, or an AWS session token, for other reasons: they never complete R2 keys.
        """
        known = [name for field in Settings.model_fields for name in variables(field)]
        values = {name: value for name in known if (value := self._found.get(name))}
        foreign = AWS_KEYS if any(name in values for name in R2_KEYS) else ()
        return {name: value for name, value in values.items() if name not in foreign}


class Settings(BaseSettings):
    """All settings. A field's description is its row in the README."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    # Where models come from
    dyno: str | None = _env("DYNO", default=None, description="set by Heroku; forces cloud-only")
    cloud_only: bool = _env(
        "ML_CLOUD_ONLY", default=True, description="`true`: nothing is written to or read from disk"
    )
    force_r2: bool = _env(
        "FORCE_R2", default=False, description="with `ML_CLOUD_ONLY=false`: write the local copy, never read it"
    )
    local_dir: Path = _env(
        "ML_LOCAL_DIR", default=Path(), description="with `ML_CLOUD_ONLY=false`: the folder that stands for the bucket"
    )
    prefix: str = _env("ML_PREFIX", default="models/", description="where in the bucket the models lie")

    # R2
    endpoint_url: str | None = _env(
        "R2_ENDPOINT_URL", "R2_ENDPOINT", default=None, description="S3 endpoint; not needed with `R2_ACCOUNT_ID`"
    )
    account_id: str | None = _env(
        "R2_ACCOUNT_ID",
        "CLOUDFLARE_ACCOUNT_ID",
        default=None,
        description="Cloudflare account; the endpoint is built from it",
    )
    jurisdiction: Literal["default", "eu", "fedramp"] = _env(
        "R2_JURISDICTION", default="default", description="`eu` or `fedramp` for a bucket made there"
    )
    aws_endpoint_url: str | None = _env(
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        default=None,
        description="used when neither `R2_ENDPOINT_URL` nor `R2_ACCOUNT_ID` is set",
    )
    bucket: str | None = _env(
        "R2_BUCKET", "R2_BUCKET_NAME", "AWS_STORAGE_BUCKET_NAME", default=None, description="the bucket"
    )
    access_key_id: str | None = _env(
        "R2_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID", default=None, description="a token with Object Read is enough to serve"
    )
    secret_access_key: SecretStr | None = _env(
        "R2_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", default=None, description="its secret"
    )
    session_token: SecretStr | None = _env(
        "R2_SESSION_TOKEN", "AWS_SESSION_TOKEN", default=None, description="for temporary credentials"
    )
    region: str = _env(
        "R2_REGION", default="auto", description="R2 knows only `auto`; other S3 servers may want another"
    )
    connect_timeout_seconds: float = _env(
        "R2_CONNECT_TIMEOUT_SECONDS", default=5.0, gt=0, le=60, description="to connect to R2"
    )
    read_timeout_seconds: float = _env(
        "R2_READ_TIMEOUT_SECONDS", default=30.0, gt=0, le=600, description="between two pieces of an answer of R2"
    )
    max_attempts: int = _env(
        "R2_MAX_ATTEMPTS", default=4, ge=1, le=20, description="tries of one R2 request, with growing random pauses"
    )

    # Which models
    refresh_seconds: float = _env(
        "ML_REFRESH_SECONDS", default=60.0, ge=1, le=86400, description="pause between two looks at the bucket"
    )
    bare_models: bool = _env(
        "ML_BARE_MODELS", default=True, description="serve `models/NAME.joblib` and the like without a manifest"
    )
    companions: Companions = _env(
        "ML_COMPANIONS", default={}, description="companions that must be there: `fraud:scaler,churn:encoder`"
    )
    aliases: Names = _env("ML_ALIASES", default=("production",), description="aliases served; the first is the default")
    required_models: Names = _env(
        "ML_REQUIRED_MODELS",
        default=(),
        description="models without which the service is not ready; unset: all found at the start",
    )

    # What is trusted
    trusted_types: Types = _env(
        "ML_TRUSTED_TYPES",
        default=frozenset(),
        description="your own classes and functions that model files may use: `shop.features.Ratios,shop.text.words`",
    )
    trusted_keys: Keys = _env(
        "ML_TRUSTED_KEYS",
        default=seal.TrustedKeys(),
        description="public keys whose seals are accepted: `ci:diskless-public-…,ann:diskless-public-…`",
    )
    require_seal: bool = _env(
        "ML_REQUIRE_SEAL", default=False, description="`true`: load nothing that none of `ML_TRUSTED_KEYS` has sealed"
    )
    version_policy: Literal["refuse", "warn"] = _env(
        "ML_VERSION_POLICY",
        default="refuse",
        description="for models of another minor version of scikit-learn or numpy than is here",
    )

    # What computes
    runtime: Literal["auto", "sklearn", "compiled"] = _env(
        "ML_RUNTIME",
        default="auto",
        description="what computes: `auto`: the compiled form, and scikit-learn where it is needed; or one of the two only",
    )

    # Memory
    memory_limit_bytes: int | None = _env(
        "ML_MEMORY_LIMIT_BYTES",
        default=None,
        ge=64 * 1024 * 1024,
        description="of this process, where the platform does not tell its limit; unset: the control group's",
    )
    swap_policy: Literal["keep", "replace"] = _env(
        "ML_SWAP_POLICY",
        default="keep",
        description="when a new version does not fit beside the old one: `keep` the old, or drop it first and `replace` it",
    )

    # Who may call
    api_keys: CallerKeys = _env(
        "ML_API_KEYS",
        default=(),
        description="keys for predictions and the status: `ann:SECRET,bob:sha256:DIGEST`; unset: anyone may predict",
    )
    admin_keys: AdminKeys = _env(
        "ML_ADMIN_KEYS",
        default=(),
        description="keys for all of that, and for refreshing and the metrics; unset: nobody may do those",
    )
    require_keys: bool = _env(
        "ML_REQUIRE_KEYS", default=False, description="`true`: do not start without `ML_API_KEYS`"
    )
    rate_limit: Annotated[Rate | None, NoDecode, BeforeValidator(_rate)] = _env(
        "ML_RATE_LIMIT",
        default=None,
        description="predictions that each of `ML_API_KEYS` may ask for: `100/s`, `6000/m`; unset: any number",
    )

    # Requests
    max_body_bytes: int = _env(
        "ML_MAX_BODY_BYTES", default=16 * 1024 * 1024, ge=1024, description="largest request body"
    )
    max_rows: int = _env("ML_MAX_ROWS", default=10_000, ge=1, description="most rows in one request")
    max_batch_rows: int = _env(
        "ML_MAX_BATCH_ROWS", default=1024, ge=1, description="most rows of several requests computed together"
    )
    max_queue: int = _env("ML_MAX_QUEUE", default=1000, ge=1, description="most requests waiting for one model")
    predict_timeout_seconds: float = _env(
        "ML_PREDICT_TIMEOUT_SECONDS",
        default=20.0,
        gt=0,
        le=600,
        description="from a request's last byte to its answer; a shorter `X-Request-Timeout` holds",
    )

    # Connections
    header_timeout_seconds: float = _env(
        "ML_HEADER_TIMEOUT_SECONDS",
        default=10.0,
        ge=1,
        le=600,
        description="from the first byte of a request's head to its last; a connection that sends nothing is kept as long",
    )
    body_timeout_seconds: float = _env(
        "ML_BODY_TIMEOUT_SECONDS",
        default=20.0,
        ge=1,
        le=3600,
        description="from the end of a request's head to the end of its body; a client that reads nothing is kept as long",
    )
    keep_alive_seconds: int = _env(
        "ML_KEEP_ALIVE_SECONDS",
        default=95,
        ge=1,
        le=86400,
        description="idle connections are kept so long; Heroku's router keeps its own for 90",
    )
    max_connections: int = _env(
        "ML_MAX_CONNECTIONS",
        default=1000,
        ge=1,
        le=100_000,
        description="most connections of a worker; above, those go that have been idle longest",
    )
    max_pending_bytes: int = _env(
        "ML_MAX_PENDING_BYTES",
        default=64 * 1024 * 1024,
        ge=1024,
        description="most bytes of large bodies, and of rows that wait, that a worker holds; never less than `ML_MAX_BODY_BYTES`",
    )

    # Browsers and hosts
    cors_origins: Origins = _env(
        "ML_CORS_ORIGINS",
        default=(),
        description="whose pages may read answers in a browser: `https://app.example.org,…`, or `*`; unset: nobody's",
    )
    allowed_hosts: Hosts = _env(
        "ML_ALLOWED_HOSTS",
        default=(),
        description="hosts that requests may name: `api.example.org,*.example.org`; health checks may name any; unset: any",
    )

    # The process
    workers: int = _env(
        "ML_WORKERS",
        "WEB_CONCURRENCY",
        default=1,
        ge=1,
        le=MAX_WORKERS,
        description="processes that answer; they share the models' memory",
    )
    host: str = _env("HOST", default="", description="address to listen on; unset: all, IPv4 and IPv6")
    port: int = _env("PORT", default=8000, ge=0, le=65535, description="port to listen on")
    drain_seconds: int = _env(
        "ML_DRAIN_SECONDS", default=25, ge=1, le=3600, description="after `SIGTERM`, for what is in flight"
    )
    log_format: Literal["json", "logfmt"] = _env("ML_LOG_FORMAT", default="json", description="form of a log line")
    access_log_sample: float = _env(
        "ML_ACCESS_LOG_SAMPLE",
        default=0.01,
        ge=0,
        le=1,
        description="share of the answered requests that are logged; those that are refused or fail always are",
    )
    docs: Literal["on", "off"] = _env(
        "ML_DOCS",
        default="on",
        description="`off`: neither `/docs` nor `/openapi.json`, which tell what models take and give",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _env(
        "ML_LOG_LEVEL", default="info", description="least level logged"
    )

    # Traces
    otlp_endpoint: str | None = _env(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        default=None,
        description="where traces go, by OTLP over HTTP: `http://collector:4318`; unset: no traces",
    )
    otlp_headers_text: SecretStr | None = _env(
        "OTEL_EXPORTER_OTLP_HEADERS",
        default=None,
        description="sent there with them, as for its key: `name=value,name=value`",
    )
    otlp_service: str = _env("OTEL_SERVICE_NAME", default="diskless", description="what traces call this service")
    trace_sample: float = _env(
        "ML_TRACE_SAMPLE",
        default=0.01,
        ge=0,
        le=1,
        description="share of the requests that are traced, of those without a `traceparent`, which says it itself",
    )

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read variables as `_Variables` does."""
        assert isinstance(env_settings, EnvSettingsSource)
        assert isinstance(dotenv_settings, EnvSettingsSource)
        return init_settings, _Variables(settings_cls, {**dotenv_settings.env_vars, **env_settings.env_vars})

    @field_validator(
        "jurisdiction", "log_level", "log_format", "version_policy", "runtime", "swap_policy", "docs", mode="before"
    )
    @classmethod
    def _in_any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("prefix")
    @classmethod
    def _prefix_ends_with_a_slash(cls, value: str) -> str:
        parts = [part for part in value.split("/") if part]
        if any(part in (".", "..") for part in parts):
            raise ValueError("expected a path in the bucket without '.' and '..'")
        return "".join(f"{part}/" for part in parts)

    @field_validator("bucket")
    @classmethod
    def _is_a_bucket(cls, value: str | None) -> str | None:
        if value is not None and not BUCKET.fullmatch(value):
            raise ValueError(f"expected the name of a bucket: letters, digits, '.', '_' and '-', got {_shown(value)}")
        return value

    @field_validator("account_id")
    @classmethod
    def _is_an_account(cls, value: str | None) -> str | None:
        if value is not None and not HOST_LABEL.fullmatch(value):
            raise ValueError(f"expected the 32 digits and letters that the dashboard shows, got {_shown(value)}")
        return value

    @field_validator("access_key_id", "secret_access_key", "session_token")
    @classmethod
    def _is_a_credential(cls, value: str | SecretStr | None) -> str | SecretStr | None:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if text is not None and (not VISIBLE_ASCII.fullmatch(text) or {text[0], text[-1]} & {"'", '"'}):
            raise ValueError(
                "expected no blank, no quotation mark and no other sign that keys do not have: copy it again"
            )
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_a_collector(cls, value: str | None) -> str | None:
        return None if value is None else _collector(value)

    @field_validator("otlp_headers_text")
    @classmethod
    def _are_headers(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _headers(value.get_secret_value())
        return value

    @field_validator("aliases")
    @classmethod
    def _one_alias_at_least(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected at least one alias, as in production,staging")
        return value

    @property
    def has_r2_credentials(self) -> bool:
        """Whether the environment speaks of a bucket at all (`AWS_*` keys alone may be there for other reasons)."""
        return bool(self.bucket or self.endpoint_url or self.account_id)

    @property
    def mode(self) -> Mode:
        """The row of the table of modes that holds."""
        if self.dyno or self.cloud_only:
            return Mode.CLOUD_ONLY
        if self.force_r2:
            return Mode.R2_FORCED
        return Mode.R2_WITH_COPY if self.has_r2_credentials else Mode.LOCAL

    @property
    def mode_reason(self) -> str:
        """Why this mode, for the status page."""
        if self.dyno:
            return "DYNO is set"
        if self.cloud_only:
            return "ML_CLOUD_ONLY is true"
        if self.force_r2:
            return "ML_CLOUD_ONLY is false and FORCE_R2 is true"
        return f"ML_CLOUD_ONLY is false and R2 credentials are {'present' if self.has_r2_credentials else 'absent'}"

    @property
    def otlp_headers(self) -> dict[str, str]:
        """What is sent with traces."""
        return {} if self.otlp_headers_text is None else _headers(self.otlp_headers_text.get_secret_value())

    @property
    def trust(self) -> Trust:
        """What is asked of a version before it is loaded."""
        return Trust(
            types=self.trusted_types,
            keys=self.trusted_keys,
            require_seal=self.require_seal,
            version_policy=self.version_policy,
            memory_limit_bytes=self.memory_limit_bytes,
        )

    @property
    def limits(self) -> Limits:
        """What connections may take."""
        return Limits(
            header_timeout_seconds=self.header_timeout_seconds,
            body_timeout_seconds=self.body_timeout_seconds,
            keep_alive_seconds=self.keep_alive_seconds,
            max_connections=self.max_connections,
        )

    @property
    def r2(self) -> R2Target:
        """What is needed to reach the bucket. Raises `SettingsError` with a line for everything that is missing."""
        problems: list[str] = []
        variable, bucket = "R2_ENDPOINT_URL", self.bucket
        endpoint = self.endpoint_url
        if endpoint is None and self.account_id is not None:
            infix = "" if self.jurisdiction == "default" else f".{self.jurisdiction}"
            endpoint = f"https://{self.account_id}{infix}{R2_HOST}"
        elif endpoint is None:
            variable, endpoint = variables("aws_endpoint_url")[0], self.aws_endpoint_url
        if endpoint is None:
            problems.append(
                "R2_ENDPOINT_URL is missing: set it to the S3 endpoint of your bucket, or R2_ACCOUNT_ID to your account's id"
            )
        else:
            try:
                endpoint, in_path = _split_endpoint(endpoint, self.jurisdiction)
            except ValueError as error:
                problems.append(f"{variable} is not usable: {error}")
            else:
                if in_path and bucket and in_path != bucket:
                    problems.append(
                        f"{variable} ends in bucket {in_path!r}, but R2_BUCKET is {bucket!r}: remove one of the two"
                    )
                bucket = bucket or in_path
        if not bucket:
            problems.append("R2_BUCKET is missing: set it to the name of the bucket that holds your models")
        if not self.access_key_id:
            problems.append(
                "R2_ACCESS_KEY_ID is missing: make an R2 API token (Object Read is enough) and set its access key id"
            )
        if not self.secret_access_key:
            problems.append(
                "R2_SECRET_ACCESS_KEY is missing: set the secret access key that came with R2_ACCESS_KEY_ID"
            )
        if problems or not (endpoint and bucket and self.access_key_id and self.secret_access_key):
            raise SettingsError(problems)
        return R2Target(endpoint, bucket, self.access_key_id, self.secret_access_key)


@dataclass(frozen=True, slots=True)
class R2Target:
    """Endpoint URL (without the bucket), bucket name, and the credentials for it."""

    endpoint_url: str
    bucket: str
    access_key_id: str
    secret_access_key: SecretStr


def load_settings() -> Settings:
    """Read and check the settings. Raises `SettingsError` with one line per problem; no secret's value is in it."""
    try:
        settings = Settings()
    except ValidationError as error:
        raise SettingsError([_problem(item) for item in error.errors(include_url=False)]) from None
    except UnicodeDecodeError:
        raise SettingsError([".env is not usable: expected UTF-8 text: save it as such, or remove it"]) from None
    except OSError as error:
        raise SettingsError([f".env cannot be read: {error.strerror}: let this user read it, or remove it"]) from None
    if settings.require_seal and not settings.trusted_keys:
        raise SettingsError(
            [
                "ML_TRUSTED_KEYS is missing: ML_REQUIRE_SEAL is true, so set the public key that "
                "`python -m app keygen` printed, or nothing could be loaded"
            ]
        )
    if settings.require_keys and not settings.api_keys:
        raise SettingsError([KEYS_MISSING.format(why="ML_REQUIRE_KEYS is true")])
    if settings.rate_limit is not None and not settings.api_keys:
        raise SettingsError(["ML_RATE_LIMIT needs ML_API_KEYS: it holds for each key; set keys, or remove the limit"])
    if settings.mode is not Mode.LOCAL:
        settings.r2  # noqa: B018 - to refuse the start, not the first request
    return settings


def variables(field: str) -> list[str]:
    """Return the names of the environment variables that `field` is read from, the first one first."""
    alias = Settings.model_fields[field].validation_alias
    assert isinstance(alias, AliasChoices)
    return [str(choice) for choice in alias.choices]


def misspelt() -> list[str]:
    """Return a line for each variable that looks like a setting, and is none: its name, never its value."""
    found = {name.upper() for name in EnvSettingsSource(Settings).env_vars}
    with suppress(OSError, UnicodeDecodeError):  # `load_settings` says what is wrong with the file
        found |= {name.upper() for name in DotEnvSettingsSource(Settings).env_vars}
    known = [name for field in Settings.model_fields for name in variables(field)]
    problems = []
    for name in sorted(found.difference(known)):
        if name.startswith(OURS):
            near = difflib.get_close_matches(name, known, 1, cutoff=0.75)
            problems.append(
                f"{shortened(name, MAX_SHOWN)} is no setting" + (f": did you mean {near[0]}?" if near else "")
            )
    return problems


class Row(NamedTuple):
    """A setting as the README shows it; every part is Markdown."""

    variable: str
    default: str
    meaning: str


def table() -> list[Row]:
    """Return a row for every setting, in the order of this file."""
    rows = []
    for field, info in Settings.model_fields.items():
        first, *others = (f"`{name}`" for name in variables(field))
        meaning = info.description or ""
        if others:
            meaning += f" (also read from {', '.join(others)})"
        rows.append(Row(first, _default(info.default), meaning))
    return rows


def markdown() -> str:
    """Return the table as Markdown: what stands between `<!-- settings -->` and `<!-- /settings -->` in the README."""
    head = [Row("variable", "default", "meaning"), Row("---", "---", "---")]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *table()])


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = ",".join(value)
    if isinstance(value, float):
        value = f"{value:g}"
    return f"`{value}`" if value not in (None, "", {}, frozenset(), seal.TrustedKeys()) else ""


def _problem(item: ErrorDetails) -> str:
    found = str(item["loc"][0])
    info = next(info for field, info in Settings.model_fields.items() if found in variables(field))
    if item["type"] == "value_error":
        return f"{found} is not usable: {item['msg'].removeprefix('Value error, ')}"
    return f"{found} is not usable: expected {_expected(info)}, got {_shown(item['input'])}"


def _expected(info: FieldInfo) -> str:
    """Say what a setting's type takes. Only the types of settings that are not secret can refuse a string."""
    if info.annotation is bool:
        return "true or false"
    if get_origin(info.annotation) is Literal:
        return f"one of {', '.join(get_args(info.annotation))}"
    kind = "a whole number" if info.annotation in (int, int | None) else "a number"
    least = next((bound for bound in info.metadata if isinstance(bound, (Ge, Gt))), Ge(0))
    most = next((f"{bound.le:g}" for bound in info.metadata if isinstance(bound, Le)), None)
    if isinstance(least, Gt):
        return f"{kind} greater than {least.gt:g}" + (f", at most {most}" if most else "")
    return f"{kind} from {least.ge:g} to {most}" if most else f"{kind}, at least {least.ge:g}"


def _shown(value: Any) -> str:
    return shortened(repr(value), MAX_SHOWN)


def _split_endpoint(url: str, jurisdiction: str) -> tuple[str, str | None]:
    """Return the endpoint, and the bucket that Cloudflare's dashboard shows as its path.

    On any other host a path belongs to the endpoint and stays.
    """
    parts = _split_url(url)
    host = parts.hostname or ""
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "expected no user name or password in it: they belong into R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY"
        )
    if parts.query or parts.fragment:
        raise ValueError("expected nothing behind the path: remove what follows '?' or '#'")
    path = parts.path.strip("/")
    if not host.endswith(R2_HOST):
        return urlunsplit((parts.scheme, parts.netloc, f"/{path}" if path else "", "", "")), None
    if parts.scheme != "https":
        raise ValueError("expected https://, which is all that R2 answers to")
    if jurisdiction != "default" and not host.endswith(f".{jurisdiction}{R2_HOST}"):
        raise ValueError(
            f"its host is not of the jurisdiction in R2_JURISDICTION, {jurisdiction!r}: remove one of the two"
        )
    if path and not BUCKET.fullmatch(path):
        raise ValueError(f"expected at most the bucket behind the host, got {_shown(path)}")
    return urlunsplit((parts.scheme, parts.netloc, "", "", "")), path or None


def _split_url(
    url: str, expected: str = "https://HOST, as in https://0123456789abcdef0123456789abcdef.r2.cloudflarestorage.com"
) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - urlsplit checks it only when it is asked for
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https") or not HOST.fullmatch(parts.hostname or "") or not url.isprintable():
        raise ValueError(f"expected {expected}")
    return parts


def _collector(url: str) -> str:
    """Return where a collector takes traces, from its base URL."""
    parts = _split_url(url, "the base URL of a collector, as in http://collector:4318")
    if parts.username is not None or parts.password is not None:
        raise ValueError("expected no user name or password in it: send them in OTEL_EXPORTER_OTLP_HEADERS")
    path = parts.path.rstrip("/")
    if path.endswith(TRACES_PATH) or parts.query or parts.fragment:
        raise ValueError(f"expected a base URL, to which {TRACES_PATH} is added, with nothing behind its path")
    return urlunsplit((parts.scheme, parts.netloc, path + TRACES_PATH, "", ""))


def _headers(text: str) -> dict[str, str]:
    """Split `api-key=abc%20def,tenant=a` into headers; their values are percent-encoded."""
    found = {}
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        name, equals, value = part.partition("=")
        name, value = name.strip().lower(), unquote(value.strip())
        if not equals or not HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
            raise ValueError(f"header {number}: expected name=value, the value percent-encoded where it has a comma")
        found[name] = value
    return found


if __name__ == "__main__":
    print(markdown())
