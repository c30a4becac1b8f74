"""Every variable: where it is read from, what it may be, and what a person is told when it cannot be that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from app import seal
from app.errors import SettingsError
from app.keys import Key
from app.rates import Rate
from app.settings import Mode, Settings, load_settings, markdown, misspelt, table, variables
from tests.service import clean_environment

PUBLIC_KEY = str(seal.public_key_of(seal.PrivateKey(bytes(range(32)))))
ACCOUNT = "0123456789abcdef0123456789abcdef"
R2 = {
    "R2_ENDPOINT_URL": "https://s3.example.com",
    "R2_BUCKET": "models",
    "R2_ACCESS_KEY_ID": "id",
    "R2_SECRET_ACCESS_KEY": "very-secret",
}
SAMPLES = {  # what each setting is read as, and from what
    "api_keys": ("ann:a-secret-of-anns-own", (Key.of("ann", "a-secret-of-anns-own"),)),
    "admin_keys": ("the-administrators-own", (Key.of("admin-1", "the-administrators-own"),)),
    "require_keys": ("true", True),
    "rate_limit": ("100/m", Rate(100, 60)),
    "docs": ("OFF", "off"),
    "log_format": ("LOGFMT", "logfmt"),
    "access_log_sample": ("0.5", 0.5),
    "dyno": ("web.1", "web.1"),
    "cloud_only": ("false", False),
    "force_r2": ("true", True),
    "local_dir": ("/srv/models", Path("/srv/models")),
    "prefix": ("a/b", "a/b/"),
    "endpoint_url": ("https://one.example.com", "https://one.example.com"),
    "account_id": (ACCOUNT, ACCOUNT),
    "jurisdiction": ("eu", "eu"),
    "aws_endpoint_url": ("https://two.example.com", "https://two.example.com"),
    "bucket": ("shelf", "shelf"),
    "access_key_id": ("key", "key"),
    "secret_access_key": ("secret", SecretStr("secret")),
    "session_token": ("token", SecretStr("token")),
    "region": ("weur", "weur"),
    "connect_timeout_seconds": ("2.5", 2.5),
    "read_timeout_seconds": ("7", 7.0),
    "max_attempts": ("2", 2),
    "refresh_seconds": ("15", 15.0),
    "bare_models": ("false", False),
    "companions": (
        "fraud:scaler, churn:encoder,fraud:encoder",
        {"fraud": ("scaler", "encoder"), "churn": ("encoder",)},
    ),
    "aliases": ("production, staging,production", ("production", "staging")),
    "required_models": ("churn,fraud", ("churn", "fraud")),
    "trusted_types": ("shop.a.B, shop.c", frozenset({"shop.a.B", "shop.c"})),
    "trusted_keys": (f"ci:{PUBLIC_KEY}", seal.parse_trusted_keys(f"ci:{PUBLIC_KEY}")),
    "require_seal": ("true", True),
    "version_policy": ("WARN", "warn"),
    "runtime": ("Compiled", "compiled"),
    "memory_limit_bytes": ("536870912", 536870912),
    "swap_policy": ("replace", "replace"),
    "max_body_bytes": ("2048", 2048),
    "max_rows": ("5", 5),
    "max_batch_rows": ("6", 6),
    "max_queue": ("7", 7),
    "predict_timeout_seconds": ("0.5", 0.5),
    "cors_origins": (
        "https://App.example.org, http://localhost:3000,http://[::1]:8080",
        ("https://app.example.org", "http://localhost:3000", "http://[::1]:8080"),
    ),
    "allowed_hosts": (
        "API.example.org,*.example.org, 10.0.0.1,[::1]",
        ("api.example.org", "*.example.org", "10.0.0.1", "[::1]"),
    ),
    "header_timeout_seconds": ("1.5", 1.5),
    "body_timeout_seconds": ("2.5", 2.5),
    "keep_alive_seconds": ("10", 10),
    "max_connections": ("50", 50),
    "max_pending_bytes": ("33554432", 33554432),
    "workers": ("3", 3),
    "host": ("127.0.0.1", "127.0.0.1"),
    "port": ("0", 0),
    "drain_seconds": ("3", 3),
    "log_level": ("DEBUG", "debug"),
    "otlp_endpoint": ("https://collector.example.com/otlp/", "https://collector.example.com/otlp/v1/traces"),
    "otlp_headers_text": ("api-key=a%2Cb", SecretStr("api-key=a%2Cb")),
    "otlp_service": ("scores", "scores"),
    "trace_sample": ("0.25", 0.25),
}
IMPOSSIBLE = [
    *[
        ("ML_CORS_ORIGINS", value, "expected origins as browsers write them, ")
        for value in (
            "app.example.org",
            "https://app.example.org/",
            "https://app.example.org/x",
            "https://example.org:443",
            "http://example.org:80",
            "*,https://example.org",
            "https://*.example.org",
            "null",
            "file://x",
            "https://a b",
            "https://user@example.org",
            "https://example.org?x",
            "https://",
        )
    ],
    *[
        ("ML_ALLOWED_HOSTS", value, "expected names as in api.example.org or *.example.org, ")
        for value in (
            "https://example.org",
            "example.org:8000",
            "*",
            "a.*.org",
            "*.*.org",
            "exam ple.org",
            "::1",
            "a/b",
        )
    ],
    ("ML_CLOUD_ONLY", "maybe", "expected true or false, got 'maybe'"),
    ("FORCE_R2", "2", "expected true or false, got '2'"),
    ("ML_BARE_MODELS", "nope!", "expected true or false, got 'nope!'"),
    ("PORT", "99999", "expected a whole number from 0 to 65535, got '99999'"),
    ("PORT", "http", "expected a whole number from 0 to 65535, got 'http'"),
    ("PORT", "80.5", "expected a whole number from 0 to 65535, got '80.5'"),
    ("R2_MAX_ATTEMPTS", "0", "expected a whole number from 1 to 20, got '0'"),
    ("R2_CONNECT_TIMEOUT_SECONDS", "0", "expected a number greater than 0, at most 60, got '0'"),
    ("R2_CONNECT_TIMEOUT_SECONDS", "nan", "expected a number greater than 0, at most 60, got 'nan'"),
    ("R2_READ_TIMEOUT_SECONDS", "inf", "expected a number greater than 0, at most 600, got 'inf'"),
    ("ML_REFRESH_SECONDS", "0.5", "expected a number from 1 to 86400, got '0.5'"),
    ("ML_MAX_BODY_BYTES", "16MB", "expected a whole number, at least 1024, got '16MB'"),
    ("ML_MAX_ROWS", "0", "expected a whole number, at least 1, got '0'"),
    ("ML_MAX_BATCH_ROWS", "-1", "expected a whole number, at least 1, got '-1'"),
    ("ML_MAX_QUEUE", "many", "expected a whole number, at least 1, got 'many'"),
    ("ML_PREDICT_TIMEOUT_SECONDS", "20 s", "expected a number greater than 0, at most 600, got '20 s'"),
    ("ML_HEADER_TIMEOUT_SECONDS", "0.5", "expected a number from 1 to 600, got '0.5'"),
    ("ML_BODY_TIMEOUT_SECONDS", "never", "expected a number from 1 to 3600, got 'never'"),
    ("ML_MAX_CONNECTIONS", "0", "expected a whole number from 1 to 100000, got '0'"),
    ("ML_MAX_PENDING_BYTES", "64MB", "expected a whole number, at least 1024, got '64MB'"),
    ("ML_KEEP_ALIVE_SECONDS", "1e9", "expected a whole number from 1 to 86400, got '1e9'"),
    ("ML_DRAIN_SECONDS", "0", "expected a whole number from 1 to 3600, got '0'"),
    ("ML_LOG_LEVEL", "loud", "expected one of debug, info, warning, error, got 'loud'"),
    ("R2_JURISDICTION", "us", "expected one of default, eu, fedramp, got 'us'"),
    ("ML_PREFIX", "../models", "expected a path in the bucket without '.' and '..'"),
    ("ML_ALIASES", ",", "expected at least one alias, as in production,staging"),
    ("ML_ALIASES", "a b", "the name 'a b' is not one: expected 1 to 100 letters, digits, '.', '_' or '-'"),
    ("ML_REQUIRED_MODELS", "churn,../x", "the name '../x' is not one: expected 1 to 100 letters"),
    ("ML_COMPANIONS", "fraud", "expected NAME:ROLE with a role of scaler, encoder, preprocessor, got 'fraud'"),
    ("ML_COMPANIONS", "fraud:oracle", "expected NAME:ROLE with a role of scaler, encoder, preprocessor, got"),
    ("R2_BUCKET", "my models", "expected the name of a bucket: letters, digits, '.', '_' and '-', got 'my models'"),
    ("R2_ACCOUNT_ID", "abc.eu", "expected the 32 digits and letters that the dashboard shows, got 'abc.eu'"),
    ("PORT", "9" * 500, "expected a whole number from 0 to 65535, got '99999"),
]
BAD_ENDPOINTS = [
    ("s3.example.com", "expected https://HOST"),
    ("ftp://s3.example.com", "expected https://HOST"),
    ("https://", "expected https://HOST"),
    ("https://s3 example.com", "expected https://HOST"),
    ("https://s3.example.com:99999", "expected https://HOST"),
    ("https://[::1", "expected https://HOST"),
    ("https://id:very-secret@s3.example.com", "expected no user name or password in it"),
    ("https://s3.example.com/?list-type=2", "expected nothing behind the path"),
    (f"http://{ACCOUNT}.r2.cloudflarestorage.com", "expected https://, which is all that R2 answers to"),
    (f"https://{ACCOUNT}.r2.cloudflarestorage.com/a/b", "expected at most the bucket behind the host, got 'a/b'"),
]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch, tmp_path):
    """An empty environment, in an empty folder: no `.env`."""
    known = {name for field in Settings.model_fields for name in variables(field)}
    for name in os.environ:
        if name.upper() in known:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def read(monkeypatch):
    """Return the settings in an environment."""

    def settings(**environment: str) -> Settings:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return load_settings()

    return settings


@pytest.fixture
def problems(read):
    """Return the lines in which an environment is refused."""

    def lines(**environment: str) -> tuple[str, ...]:
        with pytest.raises(SettingsError) as caught:
            read(**environment)
        return caught.value.problems

    return lines


def test_every_setting_has_a_sample():
    assert set(SAMPLES) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("field", "variable"), [(field, name) for field in Settings.model_fields for name in variables(field)]
)
def test_each_variable_of_a_setting_is_read(monkeypatch, field, variable):
    text, value = SAMPLES[field]
    monkeypatch.setenv(variable, text)

    assert getattr(Settings(), field) == value


def test_without_any_variable_every_setting_has_its_default():
    settings = Settings()

    assert {field: getattr(settings, field) for field in Settings.model_fields} == {
        field: info.default for field, info in Settings.model_fields.items()
    }


@pytest.mark.parametrize("field", [field for field in Settings.model_fields if len(variables(field)) > 1])
@pytest.mark.parametrize("first_in_file", [True, False])
def test_the_first_name_of_a_setting_wins_wherever_it_is_set(monkeypatch, field, first_in_file):
    first, *others = variables(field)
    text, value = SAMPLES[field]
    other = "https://other.example.com" if "endpoint" in field else "other"
    environment = {name: other for name in others}
    file = {first: text}
    if not first_in_file:
        environment, file = file, environment
    for name, setting in environment.items():
        monkeypatch.setenv(name, setting)
    Path(".env").write_text("".join(f"{name}={setting}\n" for name, setting in file.items()))

    assert getattr(Settings(), field) == value


def test_the_environment_wins_over_the_file(monkeypatch):
    Path(".env").write_text("PORT=1\nML_MAX_ROWS=2\n")
    monkeypatch.setenv("PORT", "3")
    settings = Settings()

    assert (settings.port, settings.max_rows) == (3, 2)


@pytest.mark.parametrize("where", ["environment", "file"])
def test_r2_keys_are_never_completed_by_what_the_machine_has_for_aws(monkeypatch, where):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-aws")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-aws")
    ours = R2
    if where == "file":
        Path(".env").write_text("".join(f"{name}={value}\n" for name, value in ours.items()))
    else:
        for name, value in ours.items():
            monkeypatch.setenv(name, value)
    settings = load_settings()

    assert settings.session_token is None
    assert settings.r2.secret_access_key.get_secret_value() == "very-secret"


def test_an_r2_key_id_alone_is_missing_its_secret_though_aws_has_one(problems):
    lines = problems(**{**R2, "R2_SECRET_ACCESS_KEY": ""}, AWS_SECRET_ACCESS_KEY="of-aws")

    assert [line.split()[0] for line in lines] == ["R2_SECRET_ACCESS_KEY"]


def test_aws_credentials_serve_where_there_are_no_r2_ones(read):
    names = {"AWS_ENDPOINT_URL": "https://s3.example.com", "AWS_STORAGE_BUCKET_NAME": "models"}
    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}
    settings = read(**names, **keys)

    assert settings.r2.endpoint_url == "https://s3.example.com"
    assert settings.r2.bucket == "models"
    assert settings.session_token == SecretStr("token")


def test_blanks_around_a_value_and_empty_values_are_dropped(read):
    settings = read(**{name: f" {value}\n" for name, value in R2.items()}, PORT="", ML_PREFIX="  ", ML_CLOUD_ONLY="")

    assert settings.r2.bucket == "models"
    assert settings.r2.secret_access_key.get_secret_value() == "very-secret"
    assert (settings.port, settings.prefix, settings.cloud_only) == (8000, "models/", True)


@pytest.mark.parametrize(("variable", "value", "complaint"), IMPOSSIBLE)
def test_an_impossible_value_is_one_line_with_the_remedy(problems, variable, value, complaint):
    (line,) = problems(**R2, **{variable: value}) if variable not in R2 else problems(**{**R2, variable: value})

    assert line.startswith(f"{variable} is not usable: {complaint}")
    assert len(line) < 250


def test_the_line_names_the_variable_that_was_set(problems):
    (line,) = problems(**{**R2, "R2_BUCKET": ""}, R2_BUCKET_NAME='"models"')

    assert line.startswith("R2_BUCKET_NAME is not usable: expected the name of a bucket")


def test_every_problem_has_its_own_line(problems):
    lines = problems(ML_CLOUD_ONLY="maybe", PORT="x", ML_MAX_ROWS="0")

    assert [line.split()[0] for line in lines] == ["ML_CLOUD_ONLY", "ML_MAX_ROWS", "PORT"]


@pytest.mark.parametrize(("endpoint", "complaint"), BAD_ENDPOINTS)
@pytest.mark.parametrize("variable", ["R2_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_is_none_is_refused(problems, variable, endpoint, complaint):
    rest = {name: value for name, value in R2.items() if name != "R2_ENDPOINT_URL"}
    (line,) = problems(**rest, **{variable: endpoint})

    assert line.startswith(f"{variable} is not usable: {complaint}")
    assert "very-secret" not in line


@pytest.mark.parametrize(
    ("environment", "endpoint", "bucket"),
    [
        ({"R2_ENDPOINT_URL": f"https://{ACCOUNT}.r2.cloudflarestorage.com/shelf"}, None, "shelf"),
        ({"R2_ENDPOINT_URL": f"https://{ACCOUNT}.r2.cloudflarestorage.com/shelf/"}, None, "shelf"),
        ({"R2_ENDPOINT": f"https://{ACCOUNT}.r2.cloudflarestorage.com", "R2_BUCKET": "shelf"}, None, "shelf"),
        (
            {"R2_ENDPOINT_URL": f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com/shelf", "R2_BUCKET": "shelf"},
            f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com",
            "shelf",
        ),
        ({"R2_ACCOUNT_ID": ACCOUNT, "R2_BUCKET": "b"}, None, "b"),
        ({"CLOUDFLARE_ACCOUNT_ID": ACCOUNT, "R2_BUCKET": "b"}, None, "b"),
        (
            {"R2_ACCOUNT_ID": ACCOUNT, "R2_JURISDICTION": "EU", "R2_BUCKET": "b"},
            f"https://{ACCOUNT}.eu.r2.cloudflarestorage.com",
            "b",
        ),
        (
            {"R2_ACCOUNT_ID": ACCOUNT, "R2_JURISDICTION": "fedramp", "R2_BUCKET": "b"},
            f"https://{ACCOUNT}.fedramp.r2.cloudflarestorage.com",
            "b",
        ),
        (
            {"R2_ENDPOINT_URL": "http://127.0.0.1:9000/minio/", "R2_BUCKET": "b"},
            "http://127.0.0.1:9000/minio",
            "b",
        ),
        ({"R2_ENDPOINT_URL": "http://[::1]:9000", "R2_BUCKET": "b"}, "http://[::1]:9000", "b"),
        (
            {
                "R2_ACCOUNT_ID": ACCOUNT,
                "R2_ENDPOINT_URL": "https://s3.example.com",
                "AWS_ENDPOINT_URL": "https://aws.example.com",
                "R2_BUCKET": "b",
            },
            "https://s3.example.com",
            "b",
        ),
        (
            {"R2_ACCOUNT_ID": ACCOUNT, "AWS_ENDPOINT_URL_S3": "https://aws.example.com", "R2_BUCKET": "b"},
            None,
            "b",
        ),
    ],
)
def test_endpoint_and_bucket_are_found(read, environment, endpoint, bucket):
    settings = read(R2_ACCESS_KEY_ID="id", R2_SECRET_ACCESS_KEY="secret", **environment)

    assert settings.r2.endpoint_url == (endpoint or f"https://{ACCOUNT}.r2.cloudflarestorage.com")
    assert settings.r2.bucket == bucket


def test_a_path_on_another_host_is_no_bucket(problems):
    (line,) = problems(**{**R2, "R2_ENDPOINT_URL": "https://s3.example.com/shelf", "R2_BUCKET": ""})

    assert line.startswith("R2_BUCKET is missing: set it to")


def test_two_buckets_are_one_too_many(problems):
    (line,) = problems(**{**R2, "R2_ENDPOINT_URL": f"https://{ACCOUNT}.r2.cloudflarestorage.com/shelf"})

    assert line == "R2_ENDPOINT_URL ends in bucket 'shelf', but R2_BUCKET is 'models': remove one of the two"


def test_an_endpoint_of_another_jurisdiction_is_refused(problems):
    endpoint = f"https://{ACCOUNT}.r2.cloudflarestorage.com"
    (line,) = problems(**{**R2, "R2_ENDPOINT_URL": endpoint, "R2_JURISDICTION": "eu"})

    assert line.startswith(
        "R2_ENDPOINT_URL is not usable: its host is not of the jurisdiction in R2_JURISDICTION, 'eu'"
    )


@pytest.mark.parametrize("variable", ["R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY", "R2_SESSION_TOKEN"])
@pytest.mark.parametrize("value", ["two words", '"very-secret"', "véry-secret", "very\nsecret"])
def test_a_credential_that_was_copied_badly_is_refused_and_never_shown(problems, variable, value):
    (line,) = problems(**{**R2, variable: value})

    assert line == (
        f"{variable} is not usable: expected no blank, no quotation mark and no other sign that keys do not have: "
        "copy it again"
    )


def test_headers_for_the_collector_are_split_and_decoded(read):
    settings = read(**R2, OTEL_EXPORTER_OTLP_HEADERS="Api-Key = a%2Cb , ,tenant=blue=1, authorization=Basic%20eDp5")

    assert settings.otlp_headers == {"api-key": "a,b", "tenant": "blue=1", "authorization": "Basic eDp5"}


def test_no_secret_is_in_any_representation(read):
    settings = read(**R2, R2_SESSION_TOKEN="very-secret-too", OTEL_EXPORTER_OTLP_HEADERS="key=very-secret-three")
    texts = [repr(settings), str(settings), repr(settings.r2), str(settings.model_dump()), settings.model_dump_json()]

    assert not [text for text in texts if "very-secret" in text]


def test_what_is_missing_is_named_with_its_remedy(problems):
    lines = problems()

    assert [line.split(" is missing: ")[0] for line in lines] == [
        "R2_ENDPOINT_URL",
        "R2_BUCKET",
        "R2_ACCESS_KEY_ID",
        "R2_SECRET_ACCESS_KEY",
    ]


@pytest.mark.parametrize(
    ("typed", "prefix"),
    [("models", "models/"), ("models/", "models/"), ("/a//b/", "a/b/"), ("/", ""), ("modèles 1", "modèles 1/")],
)
def test_a_prefix_always_ends_with_one_slash(read, typed, prefix):
    assert read(**R2, ML_PREFIX=typed).prefix == prefix


@pytest.mark.parametrize(
    ("environment", "mode", "reason"),
    [
        ({**R2, "DYNO": "web.1"}, Mode.CLOUD_ONLY, "DYNO is set"),
        ({**R2, "DYNO": "web.1", "ML_CLOUD_ONLY": "false"}, Mode.CLOUD_ONLY, "DYNO is set"),
        (
            {**R2, "DYNO": "web.1", "ML_CLOUD_ONLY": "false", "FORCE_R2": "true"},
            Mode.CLOUD_ONLY,
            "DYNO is set",
        ),
        (R2, Mode.CLOUD_ONLY, "ML_CLOUD_ONLY is true"),
        ({**R2, "FORCE_R2": "true"}, Mode.CLOUD_ONLY, "ML_CLOUD_ONLY is true"),
        (
            {**R2, "ML_CLOUD_ONLY": "false"},
            Mode.R2_WITH_COPY,
            "ML_CLOUD_ONLY is false and R2 credentials are present",
        ),
        ({"ML_CLOUD_ONLY": "false"}, Mode.LOCAL, "ML_CLOUD_ONLY is false and R2 credentials are absent"),
        (
            {"ML_CLOUD_ONLY": "false", "AWS_ACCESS_KEY_ID": "for", "AWS_SECRET_ACCESS_KEY": "other-things"},
            Mode.LOCAL,
            "ML_CLOUD_ONLY is false and R2 credentials are absent",
        ),
        (
            {**R2, "ML_CLOUD_ONLY": "false", "FORCE_R2": "true"},
            Mode.R2_FORCED,
            "ML_CLOUD_ONLY is false and FORCE_R2 is true",
        ),
    ],
)
def test_the_table_of_modes(read, environment, mode, reason):
    settings = read(**environment)

    assert settings.mode is mode
    assert settings.mode_reason == reason


@pytest.mark.parametrize(
    "environment",
    [
        {"DYNO": "web.1", "ML_CLOUD_ONLY": "false"},
        {},
        {"ML_CLOUD_ONLY": "false", "FORCE_R2": "true"},
        {"ML_CLOUD_ONLY": "false", "R2_BUCKET": "models"},
    ],
)
def test_credentials_are_asked_for_where_the_mode_needs_them(problems, environment):
    lines = problems(**environment)

    assert {"R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY"} <= {line.split()[0] for line in lines}


def test_a_file_that_cannot_be_read_is_named():
    Path(".env").write_bytes(b"R2_BUCKET=\xff\xfe\n")

    with pytest.raises(SettingsError, match=r"^\.env is not usable: expected UTF-8 text"):
        load_settings()


def test_the_table_has_every_setting_once_with_its_meaning():
    rows = table()

    assert [row.variable.strip("`") for row in rows] == [variables(field)[0] for field in Settings.model_fields]
    assert all(row.meaning for row in rows)
    assert "| `PORT` | `8000` | port to listen on |" in markdown().splitlines()


@pytest.mark.parametrize("command", [["serve"], ["publish", "churn", "--model", "x.joblib"], ["verify"]])
def test_the_command_line_ends_with_code_2_and_the_lines_alone(tmp_path, command):
    environment = {**R2, "R2_SECRET_ACCESS_KEY": "very secret", "PORT": "99999", "ML_CLOUD_ONLY": "maybe"}
    run = subprocess.run(
        [sys.executable, "-m", "app", *command],
        env=clean_environment(environment),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 2
    assert run.stdout == ""
    assert [line.split(" is not usable: ")[0] for line in run.stderr.splitlines()] == [
        "ML_CLOUD_ONLY",
        "R2_SECRET_ACCESS_KEY",
        "PORT",
    ]
    assert "very secret" not in run.stderr


def test_the_command_line_names_what_is_missing(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "app", "serve"],
        env=clean_environment({"DYNO": "web.1", "ML_CLOUD_ONLY": "false"}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 4
    assert all(" is missing: " in line for line in run.stderr.splitlines())


def test_variables_that_look_like_settings_and_are_none_are_told_without_their_values(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("R2_ACESS_KEY_ID=very-secret\nOTHER=very-secret\nML_PREFIX=a/\n")
    monkeypatch.setenv("ML_API_KEY", "very-secret")
    monkeypatch.setenv("ML_FLOW_OF_SOMEBODY_ELSE", "very-secret")

    assert misspelt() == [
        "ML_API_KEY is no setting: did you mean ML_API_KEYS?",
        "ML_FLOW_OF_SOMEBODY_ELSE is no setting",
        "R2_ACESS_KEY_ID is no setting: did you mean R2_ACCESS_KEY_ID?",
    ]


@pytest.mark.parametrize("field", Settings.model_fields)
def test_no_setting_is_taken_for_a_misspelt_one(monkeypatch, tmp_path, field):
    monkeypatch.chdir(tmp_path)
    for name in variables(field):
        monkeypatch.setenv(name, "")

    assert misspelt() == []


def test_a_file_of_settings_that_cannot_be_read_hides_no_misspelt_variable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(b"ML_PREFIX=\xff")
    monkeypatch.setenv("ML_API_KEY", "very-secret")

    assert misspelt() == ["ML_API_KEY is no setting: did you mean ML_API_KEYS?"]
