"""A module imports only from the rows above it, and each library stays behind its border."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "names",
    "seal",
    "versions",
    "memory",
    "trust",
    "rates",
    "keys",
    "limits",
    "settings",
    "log",
    "listening",
    "processes",
    "channel",
    "counters",
    "service_counters",
    "spans",
    "observer",
    "tracing",
    "tally",
    "worker",
    "marks",
    "signature",
    "intake",
    "inspection",
    "compiled.container",
    "compiled.op",
    "compiled.values",
    "compiled.steps",
    "compiled.numeric",
    "compiled.categories",
    "compiled.patterns",
    "compiled.text",
    "compiled.linear",
    "compiled.bayes",
    "compiled.network",
    "compiled.neighbours",
    "compiled.combined",
    "compiled.labels",
    "compiled.anomaly",
    "compiled.onnx",
    "compiled.masks",
    "compiled.trees",
    "compiled.operations",
    "compiled.program",
    "compiler.translation",
    "compiler.pipeline",
    "compiler.preprocessing",
    "compiler.text",
    "compiler.linear",
    "compiler.models",
    "compiler.combined",
    "compiler.heads",
    "compiler.trees",
    "storage.base",
    "storage.observed",
    "storage.counted",
    "storage.traced",
    "storage.reader",
    "storage.local",
    "storage.copy",
    "storage.r2",
    "manifest",
    "index",
    "loading.allowlist",
    "loading.source",
    "loading.soundness",
    "loading.reconstruction",
    "loading.pickles",
    "loading.archives",
    "loaders",
    "measuring",
    "bundle",
    "prediction",
    "reference",
    "compiler.compile",
    "compiler.candidates",
    "model",
    "timing",
    "sampling",
    "compiler.drawing",
    "compiler.proof",
    "compiler.planner",
    "gate",
    "publishing",
    "model_storage",
    "verification",
    "doctor",
    "runner",
    "registry",
    "refresher",
    "view",
    "metrics",
    "auth",
    "api.headers",
    "api.routes",
    "api.compression",
    "api.errors",
    "api.guards",
    "api.origins",
    "api.predict",
    "api.schemas",
    "api.openapi",
    "api.docs",
    "api.health",
    "api.status",
    "api.metrics",
    "main",
    "connections",
    "protocol",
    "direct",
    "forked",
    "generation",
    "prefork",
    "cli",
]
BORDERS = {
    ("aioboto3", "aiobotocore", "boto3", "botocore", "aiohttp"): {"storage.r2"},
    ("fastapi", "starlette"): {
        *(
            "api.errors",
            "api.guards",
            "api.origins",
            "api.openapi",
            "api.docs",
            "api.health",
            "api.metrics",
            "api.status",
        ),
        "main",
    },
    ("prometheus_client",): {"metrics"},
    ("uvicorn", "uvloop", "httptools"): {"connections", "protocol", "direct"},
    ("msgspec",): {"intake"},
    ("pydantic_settings", "dotenv"): {"settings"},
    ("cryptography",): {"seal"},
    ("onnxruntime",): {"compiled.onnx"},
    ("opentelemetry", "requests"): {"tracing"},
}
HEAVY = {"sklearn", "pandas", "scipy", "joblib", "skops"}
PATHS = {
    ".".join(path.relative_to(ROOT / "app").with_suffix("").parts): path
    for path in sorted((ROOT / "app").rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}


def statements(node: ast.AST, *, inner: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports in `node`, but those for the type checker; with `inner`, those inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif inner or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from statements(child, inner=inner)


def imported(path: Path, *, inner: bool = True) -> Iterator[str]:
    """Yield the full names of the modules that a file imports."""
    for statement in statements(ast.parse(path.read_text()), inner=inner):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        else:
            assert statement.level == 0, f"{path} imports relatively"
            for alias in statement.names:
                full = f"{statement.module}.{alias.name}"
                yield full if full.removeprefix("app.") in PATHS else str(statement.module)


def test_every_module_has_its_row():
    assert sorted(ORDER) == sorted(PATHS)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_module_imports_only_from_rows_above_it(name):
    above = {f"app.{row}" for row in ORDER[: ORDER.index(name)]} | {"app"}
    ours = {module for module in imported(PATHS[name]) if module.split(".")[0] == "app"}

    assert ours <= above


@pytest.mark.parametrize(
    ("libraries", "allowed"), BORDERS.items(), ids=lambda it: it[0] if isinstance(it, tuple) else ""
)
def test_a_library_stays_behind_its_border(libraries, allowed):
    users = {name for name, path in PATHS.items() if {module.split(".")[0] for module in imported(path)} & {*libraries}}

    assert users <= allowed


@pytest.mark.parametrize("name", sorted(PATHS))
def test_no_module_imports_a_heavy_library_before_it_needs_it(name):
    top = {module.split(".")[0] for module in imported(PATHS[name], inner=False)}

    assert not top & HEAVY


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "app.main",
            HEAVY | {"aioboto3", "botocore", "prometheus_client", "opentelemetry.sdk", "opentelemetry.exporter"},
        ),
        ("app.cli", HEAVY | {"numpy", "fastapi", "uvicorn", "aioboto3", "botocore", "opentelemetry"}),
        ("app.settings", HEAVY | {"numpy", "fastapi"}),
        ("app.gate", HEAVY | {"onnxruntime"}),
        ("app.compiled.operations", HEAVY | {"onnxruntime"}),
        ("app.protocol", HEAVY | {"numpy", "fastapi"}),
    ],
)
def test_importing_a_module_does_not_import(module, absent):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True).stdout

    loaded = json.loads(output)

    assert not {*loaded, *(name.split(".")[0] for name in loaded)} & absent
