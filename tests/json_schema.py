"""JSON Schema in tests: whether a value fits, and values that fit or nearly do, for the part of it that the service speaks."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from jsonschema import Draft202012Validator

Schema = dict[str, Any]

MOMENTS = st.datetimes().map(lambda moment: moment.isoformat())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5
)


def violations(value: Any, schema: Schema, components: Any) -> list[str]:
    """What keeps a value from fitting a schema, whose references lead into `components`."""
    whole = {**schema, "components": components}
    return [error.message[:500] for error in Draft202012Validator(whole).iter_errors(value)]


def fitting(schema: Schema, components: Any) -> st.SearchStrategy[Any]:
    """Values that fit a schema."""
    if "$ref" in schema:
        target: Any = {"components": components}
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return fitting(target, components)
    for several in ("oneOf", "anyOf"):
        if several in schema:
            return st.one_of([fitting(one, components) for one in schema[several]])
    if "allOf" in schema:
        first, *rest = schema["allOf"]
        return fitting(first, components).filter(lambda it: not any(violations(it, one, components) for one in rest))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "type" not in schema:
        return ANYTHING
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of([_of_type(name, schema, components) for name in types])


def _of_type(name: str, schema: Schema, components: Any) -> st.SearchStrategy[Any]:
    match name:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63 - 1)
            return st.integers(low, high) | st.integers(max(low, -9), min(high, 9)).map(float)
        case "number":
            width = 32 if schema.get("format") == "float" else 64
            usual = st.integers(-9, 9) | st.floats(-1e6, 1e6, width=32)
            return usual | st.floats(allow_nan=False, allow_infinity=False, width=width) | st.integers()
        case "string":
            if "pattern" in schema:
                return MOMENTS | st.from_regex(schema["pattern"]) | st.dates().map(str)
            return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 8), 8))
        case "array":
            return _arrays(schema, components)
        case _:
            return _objects(schema, components)


def _arrays(schema: Schema, components: Any) -> st.SearchStrategy[Any]:
    if "prefixItems" in schema:
        assert schema["minItems"] == schema["maxItems"] == len(schema["prefixItems"])
        return st.tuples(*(fitting(one, components) for one in schema["prefixItems"])).map(list)
    least = schema.get("minItems", 0)
    most = min(schema.get("maxItems", least + 3), max(least, 3))
    return st.lists(fitting(schema["items"], components), min_size=least, max_size=most)


def _objects(schema: Schema, components: Any) -> st.SearchStrategy[Any]:
    if "not" in schema:
        rest = {key: value for key, value in schema.items() if key != "not"}
        return _objects(rest, components).filter(lambda it: violations(it, schema["not"], components) != [])
    properties, required = schema.get("properties", {}), schema.get("required", [])
    named = st.fixed_dictionaries(
        {name: fitting(properties[name], components) for name in required},
        optional={name: fitting(one, components) for name, one in properties.items() if name not in required},
    )
    more = schema.get("additionalProperties", True)
    if more is False:
        return named
    least = max(0, schema.get("minProperties", 0) - len(required))
    others = st.dictionaries(
        st.text().filter(lambda name: name not in properties),
        ANYTHING if more is True else fitting(more, components),
        min_size=least,
        max_size=least if "maxProperties" in schema else least + 2,
    )
    return st.tuples(named, others).map(lambda both: both[0] | both[1])


def spoiled(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """These values with something in them replaced, left out or added, which may make them unfit."""
    return st.tuples(values, st.randoms(use_true_random=False), ANYTHING).map(lambda it: _spoil(*it))


def _spoil(value: Any, random: Any, foreign: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.15:
        return foreign
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    keys = list(copy) if isinstance(copy, dict) else list(range(len(copy)))
    key = random.choice(keys)
    chance = random.random()
    if chance < 0.15:
        del copy[key]
    elif chance < 0.3:
        if isinstance(copy, dict):
            copy[str(foreign)[:9]] = foreign
        else:
            copy.append(foreign)
    else:
        copy[key] = _spoil(copy[key], random, foreign)
    return copy
