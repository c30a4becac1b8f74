"""What a model takes and gives, as JSON Schema (2020-12, which OpenAPI 3.1 speaks).

It holds in both directions. Every request that is answered fits: the schema of a column is what `Signature.validate` takes, no
less. And what fits is answered, or refused with one of the documented errors: what only the estimator can say (a category that it
does not know, a whole number beyond 64 bits) no schema says. Of an answer only that is said which another row cannot change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from app import inspection
from app.model import Model, holds_own_code
from app.signature import Signature, TensorSpec, bounds_of, storage_of

Schema = dict[str, Any]

MAX_COLUMNS = (
    200  # that are listed one by one; more would make a document that nobody reads, and pages that do not open
)
MAX_ROW_BYTES = 64 * 1024  # of the schema of a row, whose columns may have names of any length
MAX_SHOWN = 20  # categories or classes that are given as examples
MAX_SHOWN_BYTES = 1024

_ANYTHING: Schema = {}
_SCALAR: Schema = {"type": ["string", "number", "boolean", "null"]}
_NUMBER: Schema = {"type": ["number", "null"]}
_LABEL = {"minLength": 1, "maxLength": 100}
_DATE = "^[0-9]{4}-?([0-9]{2}|W[0-9]{2})"  # how every ISO 8601 date begins
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_ORDER = ("string", "integer", "number", "boolean", "null")

ENVELOPE: dict[str, Schema] = {
    "version": {"type": ["string", "integer", "null"], **_LABEL, "description": "a loaded version"},
    "alias": {
        "type": ["string", "null"],
        **_LABEL,
        "description": "an alias that is served, the default one unless given; not together with version",
    },
}
"""What every request may say beside its rows, its model and its method."""

NOT_BOTH: Schema = {
    "required": ["version", "alias"],
    "properties": {"version": {"type": ["string", "integer"]}, "alias": {"type": "string"}},
}
"""What no request may be."""


class Row(NamedTuple):
    """The forms that a row may have: as an object, where it has one, and others."""

    record: Schema | None
    others: tuple[Schema, ...]


def column(spec: TensorSpec, *, examples: bool = True) -> Schema:
    """Return what the values of a column may be."""
    types, more = _values(spec)
    if spec.nullable:
        types.append("null")
    if examples and spec.categories:
        shown = _shown(spec.categories)
        more |= {"examples": shown} if shown else {}
    return {"type": types if len(types) > 1 else types[0], **more}


def _values(spec: TensorSpec) -> tuple[list[str], Schema]:
    if spec.datatype == "BOOL":
        return ["boolean"], {}
    if spec.datatype == "INT64":
        low, high = bounds_of(spec.dtype)
        if (low, high) == (-(2**63), 2**63 - 1):
            return ["integer"], {"format": "int64"}
        return ["integer"], {"minimum": low, "maximum": high}
    if spec.datatype == "BYTES":
        if not spec.is_datetime:
            return ["string"], {}
        zone = spec.dtype.partition(", ")[2]
        offset = "with an offset, or in UTC" if zone else "without an offset"
        return ["string"], {"pattern": _DATE, "description": f"an ISO 8601 date-time {offset}"}
    if spec.is_anything:
        return ["string", "number", "boolean"], {}
    types = ["number", "boolean"] if spec.assumed else ["number"]
    return types, {"format": "float"} if storage_of("FP64", spec.dtype).itemsize < 8 else {}


def row(signature: Signature) -> Row:
    """Return the forms of a row. Where there are too many columns, they are described together instead of one by one."""
    if signature.layout == "text":
        text = {"type": "string"}
        names = [spec.name for spec in signature.inputs]
        record = _record({name: text for name in names}, closed=True) if len(names) == 1 else None
        return Row(record, (text, {"type": "array", "items": text, "minItems": 1, "maxItems": 1}))
    if signature.layout == "records":
        values = {"anyOf": [_SCALAR, {"type": "array", "items": {"type": "string"}}]}
        return Row({"type": "object", "additionalProperties": values}, ())
    if not signature.inputs:
        description = "as many values in each row as the model has columns, which nothing tells"
        return Row(None, ({"type": "array", "items": _SCALAR, "minItems": 1, "description": description},))
    if len(signature.inputs) <= MAX_COLUMNS:
        found = Row(_columns_by_name(signature), (_columns_in_order(signature),))
        if len(orjson.dumps([found.record, *found.others])) <= MAX_ROW_BYTES:
            return found
    return _columns_together(signature)


def _columns_by_name(signature: Signature) -> Schema:
    properties: dict[str, Schema] = {}
    for spec in signature.inputs:
        schema, before = column(spec), properties.get(spec.name)
        properties[spec.name] = schema if before in (None, schema) else {"allOf": [before, schema]}
    unread = {name: {"description": "not read"} for name in signature.ignored if name not in properties}
    return _record(properties, unread, closed=signature.extra_columns == "forbid")


def _record(properties: dict[str, Schema], optional: dict[str, Schema] | None = None, *, closed: bool) -> Schema:
    return {
        "type": "object",
        "properties": properties | (optional or {}),
        "required": list(properties),
        "additionalProperties": not closed,
    }


def _columns_in_order(signature: Signature) -> Schema:
    schemas = [column(spec) for spec in signature.inputs]
    alike = all(schema == schemas[0] for schema in schemas)
    titled = [{"title": spec.name, **schema} for spec, schema in zip(signature.inputs, schemas, strict=True)]
    return {
        "type": "array",
        **({"items": schemas[0]} if alike else {"prefixItems": titled}),
        "minItems": len(schemas),
        "maxItems": len(schemas),
        "description": "the values in the order of the columns",
    }


def _columns_together(signature: Signature) -> Row:
    kinds: list[Schema] = []
    for spec in signature.inputs:
        schema = column(spec, examples=False)
        if schema not in kinds:
            kinds.append(schema)
    value = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    count, names = len(signature.inputs), len({spec.name for spec in signature.inputs})
    where = f"{count} columns, which GET /models/status names"
    record: Schema = {"type": "object", "minProperties": names, "description": f"a value for each of the {where}"}
    if signature.extra_columns == "forbid" and not signature.ignored:
        record |= {"maxProperties": names, "additionalProperties": value}
    listed = {"type": "array", "items": value, "minItems": count, "maxItems": count}
    return Row(record, ({**listed, "description": f"the values of the {where}, in their order"},))


def methods(signature: Signature) -> Schema:
    """Return what may be asked for."""
    return {"type": "string", "enum": list(signature.methods)}


def request(name: str, signature: Signature, row_schema: Schema, method_schema: Schema, *, max_rows: int) -> Schema:
    """Return what may be sent to the path of the model `name`."""
    default = signature.default_method
    properties: dict[str, Schema] = {
        "instances": {
            "type": "array",
            "items": row_schema,
            "minItems": 1,
            "maxItems": max_rows,
            "description": "the rows, in either form" if "oneOf" in row_schema else "the rows",
        },
        "method": {"oneOf": [method_schema, {"type": "null"}], "description": f"`{default}` unless given"},
        **ENVELOPE,
        "model": {
            "oneOf": [{"type": "string", "const": name}, {"type": "null"}],
            "description": "the path says it already",
        },
    }
    return {
        "type": "object",
        "required": ["instances"],
        "properties": properties,
        "additionalProperties": False,
        "not": NOT_BOTH,
    }


def answer(model: Model) -> Schema:
    """Return what comes back: predictions in the form of the method that was asked for."""
    signature = model.signature
    forms: list[Schema] = []
    for method in signature.methods:
        form = _ANYTHING if _is_somebodys_own(model) else _prediction(model, method)
        if form not in forms:
            forms.append(form)
    lists = [{"type": "array", "items": form, "minItems": 1} for form in ([_ANYTHING] if _ANYTHING in forms else forms)]
    properties: dict[str, Schema] = {
        "model": {"type": "string"},
        "version": {"type": "string"},
        "predictions": {
            **(lists[0] if len(lists) == 1 else {"anyOf": lists}),
            "description": "one for each row; null where it is no finite number",
        },
    }
    if signature.classes is not None and {*signature.methods} & {*signature.by_class}:
        properties["classes"] = {
            **_classes(signature.classes),
            "description": "the classes that the numbers of a row belong to, in order",
        }
    return {"type": "object", "required": ["model", "version", "predictions"], "properties": properties}


def _is_somebodys_own(model: Model) -> bool:
    """Whether code that is not scikit-learn's makes the answer: it may give another form for other rows."""
    if model.reference is None:
        return False
    decoders = [part for part in model.reference.companions if inspection.is_target_encoder(part)]
    last = model.reference.estimator
    while type(last).__name__ == "Pipeline" and getattr(last, "steps", None):
        last = last.steps[-1][1]
    return holds_own_code([last, *decoders])


def _prediction(model: Model, method: str) -> Schema:
    """Return the form of one row's prediction."""
    signature = model.signature
    spec = next((spec for spec in signature.outputs if spec.name == method), None)
    golden = model.golden.outputs.get(method) if model.golden else None
    leaf = _leaf(signature, method, golden)
    if spec is None or golden is None:
        return _unrecorded(signature, method, leaf)
    sizes = list(spec.shape[1:])
    if method == "predict" and signature.classes is not None and not _is_nested(signature.classes):
        sizes = [-1 for _ in sizes]  # labels, of which another row may have more
    if method == "transform" and not signature.inputs:
        sizes = [-1 for _ in sizes]
    for size in reversed(sizes):
        leaf = _list(leaf, size)
    return leaf


def _unrecorded(signature: Signature, method: str, leaf: Schema) -> Schema:
    """Return the form of a prediction that nobody has tried: all that scikit-learn may give."""
    nested = _is_nested(signature.classes)
    classes = len(signature.classes or ()) or -1
    one_or_many: Schema = {"anyOf": [leaf, _list(leaf)]}
    if method == "predict":
        return _list(leaf, classes) if nested else one_or_many
    if method in ("predict_proba", "predict_log_proba"):
        return _list(one_or_many, classes) if nested else _list(leaf, classes)
    if method == "transform":
        return _list(leaf)
    return leaf if method == "score_samples" else one_or_many


def _leaf(signature: Signature, method: str, golden: Sequence[Any] | None) -> Schema:
    """Return what the values in a prediction are."""
    if method == "predict" and signature.classes is not None:
        return _of_types(_leaves(signature.classes))
    recorded = {_TYPES.get(type(value), "") for value in _leaves(golden or ())}
    known = recorded - {"null"}
    if method == "predict" and recorded == {"integer"}:
        return {"type": "integer"}  # the number of a cluster, or of what is no outlier
    if method != "transform":
        return _NUMBER if known <= {"integer", "number"} else _ANYTHING
    plain = signature.layout in ("text", "records") or all(
        spec.datatype in ("FP64", "INT64") and not spec.is_anything for spec in signature.inputs
    )
    if known and not any(spec.is_anything for spec in signature.inputs):
        plain = known <= {"integer", "number"}
    return _NUMBER if plain else _SCALAR


def _classes(classes: Sequence[Any]) -> Schema:
    shown = _shown(classes)
    inner: Schema = {"type": "array", "items": _of_types(_leaves(classes))} if _is_nested(classes) else (
        _of_types(classes)
    )  # fmt: skip
    return {"type": "array", "items": inner, **({"examples": [list(classes)]} if len(shown) == len(classes) else {})}


def _is_nested(classes: Sequence[Any] | None) -> bool:
    """Whether there are several outputs, each with its classes."""
    return bool(classes) and isinstance(classes[0], list)  # type: ignore[index]


def _list(items: Schema, size: int = -1) -> Schema:
    return {"type": "array", "items": items} | ({"minItems": size, "maxItems": size} if size >= 0 else {})


def _of_types(values: Iterator[Any] | Sequence[Any]) -> Schema:
    found = {_TYPES.get(type(value), "") for value in values}
    if not found or "" in found:
        return _ANYTHING
    types = [name for name in _ORDER if name in found and not (name == "integer" and "number" in found)]
    return {"type": types if len(types) > 1 else types[0]}


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _leaves(value)
        else:
            yield value


def _shown(values: Sequence[Any]) -> list[Any]:
    """Return the first of these values, as many as a reader may want to see."""
    shown = list(values[:MAX_SHOWN])
    while shown and len(orjson.dumps(shown)) > MAX_SHOWN_BYTES:
        shown = shown[: len(shown) // 2]
    return shown
