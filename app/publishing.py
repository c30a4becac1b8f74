"""From fitted objects, or files of them, to what a version stores: artifacts, signature, golden rows, library versions.

Nothing here touches the bucket. Whatever would make the model fail in the service makes the draft fail: it is loaded from
the very bytes that will be stored, and its examples go through the same validation as a request.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from app import inspection, loaders, memory, versions
from app.errors import GoldenMismatch, PublishError, RequestError, UnusableExamples
from app.manifest import COMPILED, PROGRAM_FORMAT, Artifact, Compiled, Golden, Manifest
from app.measuring import measure
from app.memory import MEASURED_FROM_BYTES, Taken
from app.model import Model, compare, holds_own_code, wire
from app.names import COMPANION_ROLES, SUFFIXES, ModelRef
from app.signature import Datatype, Signature, TensorSpec
from app.trust import Trust

NOT_ASKED_FOR = "it was published without a compiled form, as was asked for"
KNOWN_ROWS = 1000  # examples that a compiled form is compared on, beside those that are drawn around them
GOLDEN_ROWS = 100
ROWS_ALONE = 10  # of them are run one by one as well
GOLDEN_BYTES = 256 * 1024
UNPACKED_FROM_BYTES = 8 * 1024 * 1024
ENDINGS = {"joblib": ".joblib", "pickle": ".pkl", "skops": ".skops"}


@dataclass(frozen=True, slots=True)
class DraftPart:
    """One artifact to be: its role, its format, its bytes."""

    role: str
    format: str
    body: bytes

    @property
    def path(self) -> str:
        """Where it will lie beside the manifest.

        A compiled form is called by its digest: which form was fastest may come out otherwise when a publish is repeated, and
        what lies there already is never overwritten.
        """
        if self.role == COMPILED:
            return f"{COMPILED}/{hashlib.sha256(self.body).hexdigest()[:16]}.{self.format}"
        return f"{self.role}{ENDINGS[self.format]}"


@dataclass(frozen=True, slots=True)
class Draft:
    """A version that is ready to be stored, but for its name and label. Companions come first, the model last.

    `compiled` is what is known of its compiled form, which is the first part; `not_compiled` is why it has none.
    """

    parts: tuple[DraftPart, ...]
    signature: Signature
    golden: Golden | None
    trained_with: dict[str, str]
    taken: Taken | None = None
    compiled: Compiled | None = None
    not_compiled: str | None = None
    summary: str = ""

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
            resident_bytes=self.taken.resident_bytes if self.taken else None,
            peak_bytes=self.taken.peak_bytes if self.taken else None,
            compiled=self.compiled,
            not_compiled=self.not_compiled,
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
        raise PublishError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    try:
        return DraftPart(role, format, path.read_bytes())
    except OSError as error:
        raise PublishError(f"the {role} cannot be read: {error.strerror}: {path}") from error


def draft(
    parts: Mapping[str, DraftPart],
    examples: Any = None,
    *,
    extra_columns_ignored: bool = False,
    trust: Trust | None = None,
    compile: bool = False,
) -> Draft:
    """Load the parts, infer the signature, run the examples, and measure the memory that loading takes.

    With `compile`, a compiled form is made and proved; that there is none, for whatever reason, is no error.

    `parts` is by role and has at least `model`; `trust` is what the service will trust, too.

    `examples` is a DataFrame, an array of shape (n, features), a list of texts, records or rows, or a `Table`.
    Raises `PublishError` or `BundleError` for anything that would not serve.
    """
    ordered = tuple(parts[role] for role in (*COMPANION_ROLES, "model") if role in parts)
    trust = trust or Trust()
    loaded = [_load(part, trust) for part in ordered]
    trained_with = _versions(loaded)
    versions.check(trained_with, "the model", policy=trust.version_policy)
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
    plain = Draft(ordered, signature, golden, trained_with, _measured(ordered, trust), not_compiled=NOT_ASKED_FOR)
    if not compile:
        return plain
    known = inspection.instances_of(examples[:KNOWN_ROWS], signature) if examples is not None else []
    return _compiled(plain, Model(ModelRef("draft", "0"), signature, estimator, companions, golden=golden), known)


def _compiled(plain: Draft, model: Model, known: Sequence[Any]) -> Draft:
    """Return a draft with a compiled form, or with the reason why it has none."""
    from threadpoolctl import threadpool_limits

    from app.compiler import planner

    # The warnings are of rows that nobody will send; and a service computes with one thread.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        plan = planner.plan(model, known, taken=plain.taken)
    parts = plain.parts
    if plan.body is not None:
        parts = (DraftPart(COMPILED, PROGRAM_FORMAT, plan.body), *parts)
    return replace(plain, parts=parts, compiled=plan.compiled, not_compiled=plan.reason, summary=plan.summary)


def _measured(parts: tuple[DraftPart, ...], trust: Trust) -> Taken | None:
    """Measure what loading takes; None for what takes nothing that counts, in the bucket or, unpacked, in memory."""
    if sum(len(part.body) for part in parts) < MEASURED_FROM_BYTES:
        before = memory.resident_bytes()
        again = [_load(part, trust) for part in parts]  # the first time, the libraries were imported as well
        gained = memory.resident_bytes() - before
        del again
        if gained < UNPACKED_FROM_BYTES:
            return None
    return measure([(part.format, part.body) for part in parts], trusted=trust.types)


def _load(part: DraftPart, trust: Trust) -> loaders.Loaded:
    most = trust.bytes_for(len(part.body))
    return loaders.load(part.format, io.BytesIO(part.body), part.path, trusted=trust.types, max_bytes=most)


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
    written = next((item.trained_version for item in loaded if item.trained_version), None)
    return {**versions.present_versions(), **({"scikit-learn": written} if written else {})}


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


class _Columns(Exception):
    """What was read has its columns in a row, each with its values by the number of the row: pandas' own form of JSON."""


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
        raise UnusableExamples(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    except _Columns as error:
        raise UnusableExamples(f'{path}: expected a list of rows: write it with to_json(orient="records")') from error
    except OSError as error:
        raise UnusableExamples(f"the examples cannot be read: {error.strerror}: {path}") from error
    except Exception as error:  # whatever a parser says of a broken file
        raise UnusableExamples(f"{path}: cannot be read: {loaders.reason(error)}") from error
    raise UnusableExamples(f"{path}: expected a file that ends in .csv, .parquet or .json")


def _read_json(body: bytes) -> Any:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = [orjson.loads(line) for line in body.splitlines() if line.strip()]
    if isinstance(data, dict) and data and all(isinstance(column, dict) for column in data.values()):
        raise _Columns
    if isinstance(data, dict):
        data = data.get("instances", [data])
    if not isinstance(data, list):
        raise TypeError("expected a list of rows or of objects")
    return data
