"""From fitted objects, or files of them, to what a version stores: artifacts, signature, golden rows, library versions.

Nothing here touches the bucket. Whatever would make the model fail in the service makes the draft fail: it is loaded from
the very bytes that will be stored, and its examples go through the same validation as a request.
"""

from __future__ import annotations

import importlib.metadata
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from app import inspection, loaders
from app.errors import GoldenMismatch, PublishError, RequestError, UnusableExamples
from app.manifest import Artifact, Golden, Manifest
from app.model import Model, compare, holds_own_code, parts_of, wire
from app.names import COMPANION_ROLES, SUFFIXES, ModelRef
from app.signature import Datatype, Signature, TensorSpec

GOLDEN_ROWS = 100
ROWS_ALONE = 10  # of them are run one by one as well
GOLDEN_BYTES = 256 * 1024
LIBRARIES = ("scikit-learn", "numpy", "scipy", "joblib", "pandas")
ENDINGS = {"joblib": ".joblib", "pickle": ".pkl", "skops": ".skops"}


@dataclass(frozen=True, slots=True)
class DraftPart:
    """One artifact to be: its role, its format, its bytes."""

    role: str
    format: str
    body: bytes

    @property
    def path(self) -> str:
        """Where it will lie beside the manifest."""
        return f"{self.role}{ENDINGS[self.format]}"


@dataclass(frozen=True, slots=True)
class Draft:
    """A version that is ready to be stored, but for its name and label. Companions come first, the model last."""

    parts: tuple[DraftPart, ...]
    signature: Signature
    golden: Golden | None
    trained_with: dict[str, str]

    def manifest(self, ref: ModelRef, created: str) -> Manifest:
        """Return the manifest of this draft as `ref`."""
        artifacts = tuple(
            Artifact.of(part.body, role=part.role, path=part.path, format=part.format) for part in self.parts
        )
        return Manifest(
            format=1,
            name=ref.name,
            version=ref.version,
            created=created,
            artifacts=artifacts,
            signature=self.signature,
            golden=self.golden,
            trained_with=self.trained_with,
        )


def part_from_object(role: str, value: Any, format: str = "joblib") -> DraftPart:
    """Serialise a fitted object. Raises `PublishError` when it cannot be."""
    buffer = io.BytesIO()
    try:
        if format == "joblib":
            import joblib

            joblib.dump(value, buffer)
        elif format == "skops":
            import skops.io

            skops.io.dump(value, buffer)
        elif format == "pickle":
            import pickle

            pickle.dump(value, buffer, protocol=5)
        else:
            raise PublishError(f"format {format!r} is not one of {', '.join(ENDINGS)}")
    except PublishError:
        raise
    except Exception as error:  # picklers raise whatever the object's own code raises
        raise PublishError(
            f"the {role} cannot be written as {format}: {loaders.reason(error)}{_advice(error)}"
        ) from error
    return DraftPart(role, format, buffer.getvalue())


def _advice(error: Exception) -> str:
    text = str(error)
    if "<lambda>" in text or "<locals>" in text or "local object" in text:
        return "; a lambda or a function within a function has no name to load it by: define it in a module"
    return ""


def part_from_file(role: str, path: Path) -> DraftPart:
    """Read an artifact from a file; its format is told by the file's ending. Raises `PublishError`."""
    format = SUFFIXES.get(path.suffix.lower())
    if format is None:
        raise PublishError(f"{path.name}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        return DraftPart(role, format, path.read_bytes())
    except OSError as error:
        raise PublishError(f"the {role} cannot be read: {error.strerror}: {path.name}") from error


def draft(parts: Mapping[str, DraftPart], examples: Any = None, *, extra_columns_ignored: bool = False) -> Draft:
    """Load the parts, infer the signature, and run the examples. `parts` is by role and has at least `model`.

    `examples` is a DataFrame, an array of shape (n, features), a list of texts, records or rows, or a `Table`.
    Raises `PublishError` or `BundleError` for anything that would not serve.
    """
    ordered = tuple(parts[role] for role in (*COMPANION_ROLES, "model") if role in parts)
    loaded = [loaders.load(part.format, io.BytesIO(part.body), part.path) for part in ordered]
    for part, item in zip(ordered, loaded, strict=True):
        _check_importable(part.role, item.value)
    *companions, estimator = (item.value for item in loaded)
    if isinstance(examples, Table):
        examples = examples.read(inspection.columns_of_strings(companions, estimator, examples.columns))
    if examples is not None:
        examples = inspection.prepare(companions, estimator, examples)
    signature = inspection.infer(companions, estimator, examples, extra_columns_ignored=extra_columns_ignored)
    model = Model(ModelRef("draft", "0"), signature, estimator, companions)
    golden = _golden(model, examples[:GOLDEN_ROWS]) if examples is not None else None
    rowwise = not holds_own_code([*companions, estimator])
    if golden is not None:
        outputs = tuple(_output_spec(method, output) for method, output in golden.outputs.items())
        rowwise = _is_rowwise(model, golden) if len(golden.instances) > 1 else rowwise
        signature = signature.model_copy(update={"outputs": outputs})
    signature = signature.model_copy(update={"rowwise": rowwise})
    return Draft(ordered, signature, golden, _versions(loaded))


def _check_importable(role: str, value: Any) -> None:
    """Refuse what only this process can load: pickles have functions and classes by name, and `__main__` is another there."""
    for part in parts_of(value):
        for item in (type(part), *vars(part).values()):
            if getattr(item, "__module__", None) == "__main__":
                raise PublishError(
                    f"the {role} uses {getattr(item, '__name__', item)!r}, which is defined in a notebook or script: "
                    "the service cannot import it from there, move it into a module that the service has"
                )


def _golden(model: Model, examples: Any) -> Golden:
    """Run the examples as a request would, and as the estimator itself would: both must say the same."""
    instances = inspection.instances_of(examples, model.signature)
    while True:
        instances = instances[: len(examples)]
        try:
            body = orjson.dumps(instances)
        except TypeError as error:
            raise UnusableExamples(f"the examples cannot be written as JSON: {error}") from error
        if len(body) <= GOLDEN_BYTES or len(instances) == 1:
            outputs = {
                method: _golden_output(model, method, orjson.loads(body), examples)
                for method in model.signature.methods
            }
            if len(orjson.dumps(outputs)) <= GOLDEN_BYTES or len(instances) == 1:
                return Golden(instances=instances, outputs=outputs)
        examples = examples[: len(instances) // 2]


def _golden_output(model: Model, method: str, instances: list[Any], examples: Any) -> list[Any]:
    try:
        output = wire(model.predict(model.signature.validate(instances), method))
        direct = wire(model.predict_directly(examples, method))
    except RequestError as error:
        told = loaders.reason(error.__cause__) if error.__cause__ else str(error)
        times = inspection.likely_times(examples)
        hint = f"; {times!r} looks like date-times, which are strings here: use parquet, or save() with a DataFrame"
        raise UnusableExamples(
            f"the model cannot answer {method} for the examples: {told}{hint if times else ''}"
        ) from error
    try:
        compare("examples", method, direct, output)
    except GoldenMismatch as error:
        raise UnusableExamples(
            f"{method}: the examples give other answers once they have been JSON: {error}; "
            "do they have the dtypes that the model was trained with?"
        ) from error
    return output


def _is_rowwise(model: Model, golden: Golden) -> bool:
    """Whether rows alone get the answers that they get beside others. Code that looks at whole columns gives others."""
    for index in range(min(ROWS_ALONE, len(golden.instances))):
        alone = model.signature.validate(golden.instances[index : index + 1])
        for method, recorded in golden.outputs.items():
            try:
                compare("alone", method, recorded[index : index + 1], wire(model.predict(alone, method)))
            except (GoldenMismatch, RequestError):
                return False
    return True


def _output_spec(method: str, output: list[Any]) -> TensorSpec:
    """Tell a method's datatype and shape from its answers to the golden rows; -1 where rows differ, or may."""
    shape, values = [-1], output
    while values and all(isinstance(value, list) for value in values):
        widths = {len(value) for value in values}
        shape.append(widths.pop() if len(widths) == 1 else -1)
        values = [item for value in values for item in value]
    kinds = {type(value) for value in values if value is not None}
    datatypes: dict[frozenset[type], tuple[Datatype, str]] = {
        frozenset({bool}): ("BOOL", "bool"),
        frozenset({int}): ("INT64", "int64"),
        frozenset({str}): ("BYTES", "object"),
    }
    datatype, dtype = datatypes.get(frozenset(kinds), ("FP64", "float64"))
    nullable = any(value is None for value in values)
    return TensorSpec(name=method, datatype=datatype, shape=tuple(shape), dtype=dtype, nullable=nullable)


def _versions(loaded: list[loaders.Loaded]) -> dict[str, str]:
    """Return the versions of Python and the libraries; scikit-learn's is the one that wrote the file, if it differs."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    written = next((item.trained_version for item in loaded if item.trained_version), None)
    return versions | ({"scikit-learn": written} if written else {})


@dataclass(frozen=True, slots=True)
class Table:
    """A csv file. Only the model can tell what in it is a string: a zip code such as `01234` looks like a number."""

    path: Path
    columns: tuple[str, ...]

    def read(self, strings: Sequence[str] = ()) -> Any:
        """Return its DataFrame, with the columns `strings` as they are written. Raises `UnusableExamples`."""
        import pandas as pd

        try:
            return pd.read_csv(self.path, dtype=dict.fromkeys(strings, str))
        except Exception as error:  # whatever a parser says of a broken file
            raise UnusableExamples(f"{self.path.name}: cannot be read: {loaders.reason(error)}") from error


def read_examples(path: Path) -> Any:
    """Read examples from a file that ends in .csv, .parquet or .json (a list of rows or of objects, or JSON lines).

    Raises `UnusableExamples` when it cannot be read.
    """
    import pandas as pd

    ending = path.suffix.lower()
    try:
        if ending == ".csv":
            return Table(path, tuple(map(str, pd.read_csv(path, nrows=0).columns)))
        if ending == ".parquet":
            return pd.read_parquet(path)
        if ending in (".json", ".jsonl", ".ndjson"):
            return _read_json(path.read_bytes())
    except ImportError as error:
        raise UnusableExamples(f"{path.name}: reading parquet needs pyarrow: pip install pyarrow") from error
    except OSError as error:
        raise UnusableExamples(f"the examples cannot be read: {error.strerror}: {path.name}") from error
    except Exception as error:  # whatever a parser says of a broken file
        raise UnusableExamples(f"{path.name}: cannot be read: {loaders.reason(error)}") from error
    raise UnusableExamples(f"{path.name}: expected a file that ends in .csv, .parquet or .json")


def _read_json(body: bytes) -> Any:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = [orjson.loads(line) for line in body.splitlines() if line.strip()]
    if isinstance(data, dict):
        data = data.get("instances", [data])
    if not isinstance(data, list):
        raise TypeError("expected a list of rows or of objects")
    return data
