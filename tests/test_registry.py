"""What is served at one moment: who is found, who is not and what that says, and when the service is ready."""

import pytest

from app import inspection
from app.errors import ModelNotFound, ModelNotReady
from app.model import Model
from app.names import ModelRef
from app.registry import Entry, Registry, Slot, Snapshot, State
from app.runner import Runner
from tests.repository import linear


def ready(name, version="1", **more) -> Slot:
    ref = ModelRef(name, version)
    model = Model(ref, inspection.infer((), linear(0)), linear(0))
    return Slot(ref, State.READY, runner=Runner(model), **more)


def loading(name, version="1") -> Slot:
    return Slot(ModelRef(name, version), State.LOADING)


def broken(name, version="1") -> Slot:
    reason = "sha256 differs in /srv/models"
    return Slot(ModelRef(name, version), State.UNAVAILABLE, reason, hint="sha256 differs")


def snapshot(**slots: Slot) -> Snapshot:
    result = Snapshot()
    for name, slot in slots.items():
        serving = {"production": slot.ref.version} if slot.runner else {}
        result = result.with_entry(name, Entry({slot.ref.version: slot}, serving, {"production": slot.ref.version}))
    return result


def holding(table: Snapshot, *, settled: bool = True, **options) -> Registry:
    registry = Registry(**options)
    registry.swap(table)
    if settled:
        registry.settle()
    return registry


def test_the_only_model_needs_no_name_and_several_do():
    assert holding(snapshot(a=ready("a"))).get().model.ref.name == "a"
    with pytest.raises(ModelNotFound, match=r"several models are served.*a, b"):
        holding(snapshot(a=ready("a"), b=ready("b"))).get()


def test_an_unknown_model_version_or_alias_is_answered_with_what_there_is():
    registry = holding(snapshot(a=ready("a", "7")))

    with pytest.raises(ModelNotFound, match="'b' is not served; served are: a"):
        registry.get("b")
    with pytest.raises(ModelNotFound, match="a has no version '8' loaded; loaded are version 7 and alias production$"):
        registry.get("a", version="8")
    with pytest.raises(ModelNotFound, match="a has no alias 'staging' loaded"):
        registry.get("a", alias="staging")
    two = Entry({label: ready("a", label) for label in ("7", "8")}, {"production": "7", "staging": "8"})
    with pytest.raises(
        ModelNotFound, match="loaded are versions 7, 8 and aliases production, staging; ML_ALIASES says"
    ):
        holding(Snapshot({"a": two})).get("a", alias="canary")
    assert registry.get("a", version="7") is registry.get("a", alias="production") is registry.get("a")


def test_what_is_known_but_cannot_answer_is_not_ready_and_says_why_without_paths():
    registry = holding(snapshot(a=loading("a"), b=broken("b")))

    with pytest.raises(ModelNotReady, match="a/1 is LOADING"):
        registry.get("a")
    with pytest.raises(ModelNotReady, match=r"b/1 is UNAVAILABLE: sha256 differs$") as caught:
        registry.get("b")
    assert "/srv" not in str(caught.value)


def test_while_the_service_starts_no_model_is_unknown():
    registry = Registry()

    for name in (None, "a"):
        with pytest.raises(ModelNotReady):
            registry.get(name)


def test_an_alias_serves_its_old_version_while_the_new_one_loads():
    old, new = ready("a", "1"), loading("a", "2")
    table = Snapshot().with_entry("a", Entry({"1": old, "2": new}, {"production": "1"}, {"production": "2"}))
    registry = holding(table)

    assert registry.get("a").model.ref.version == "1"
    assert registry.not_ready() is None
    with pytest.raises(ModelNotReady, match="a/2 is LOADING"):
        registry.get("a", version="2")


def test_a_swap_is_one_step_and_returns_what_nobody_finds_any_more():
    first, second, other = ready("a", "1"), ready("a", "2"), ready("b")
    registry = holding(snapshot(a=first, b=other))
    before = registry.snapshot
    retired = registry.swap(snapshot(a=second, b=other))

    assert retired == [first.runner]
    assert registry.get("a") is second.runner
    assert before.entries["a"].slots["1"] is first  # whoever still reads the old table reads all of it


@pytest.mark.parametrize(
    ("table", "settled", "reason"),
    [
        (Snapshot(), False, "the bucket has not been read yet"),
        (Snapshot(), True, "the bucket has no model to serve"),
        (snapshot(a=loading("a")), False, "the models are being loaded"),
        (snapshot(a=ready("a"), b=loading("b")), False, "the models are being loaded"),
        (snapshot(a=ready("a"), b=broken("b")), True, "b/1 is UNAVAILABLE: sha256 differs"),
        (snapshot(a=ready("a"), b=ready("b")), True, None),
    ],
)
def test_ready_is_every_model_found_at_the_start(table, settled, reason):
    assert holding(table, settled=settled).not_ready() == reason


@pytest.mark.parametrize("extra", [loading("b"), broken("b")])
def test_a_model_that_comes_later_never_lowers_readiness(extra):
    registry = holding(snapshot(a=ready("a")))
    registry.swap(snapshot(a=ready("a"), b=extra))

    assert registry.not_ready() is None


def test_a_service_that_started_empty_is_ready_with_its_first_model():
    registry = holding(Snapshot())
    registry.swap(snapshot(a=loading("a")))
    assert registry.not_ready() == "a/1 is LOADING"
    registry.swap(snapshot(a=ready("a"), b=broken("b")))

    assert registry.not_ready() is None


def test_a_model_that_was_removed_from_the_bucket_is_not_required_any_more():
    registry = holding(snapshot(a=ready("a"), b=ready("b")))
    registry.swap(snapshot(a=ready("a")))

    assert registry.not_ready() is None


@pytest.mark.parametrize(
    ("table", "settled", "reason"),
    [
        (Snapshot(), False, "the bucket has not been read yet"),
        (snapshot(b=ready("b")), True, "a is required, but not in the bucket"),
        (snapshot(a=loading("a"), b=ready("b")), False, "a/1 is LOADING"),
        (snapshot(a=ready("a"), b=loading("b")), False, None),
        (snapshot(a=ready("a"), b=broken("b")), True, None),
        (snapshot(a=broken("a"), b=ready("b")), True, "a/1 is UNAVAILABLE: sha256 differs"),
    ],
)
def test_with_required_models_named_only_they_decide(table, settled, reason):
    assert holding(table, settled=settled, required=("a",)).not_ready() == reason


def test_why_the_bucket_cannot_be_read_is_the_reason_until_it_was_read():
    registry = Registry()
    registry.unreadable("index.json is not an index")

    assert registry.not_ready() == "index.json is not an index"


def test_a_model_under_another_alias_only_does_not_block_readiness_but_is_not_the_default():
    table = Snapshot().with_entry("a", Entry({"1": ready("a")}, {"staging": "1"}, {"staging": "1"}))
    registry = holding(table, aliases=("production", "staging"))

    assert registry.not_ready() is None
    assert registry.get("a", alias="staging").model.ref.version == "1"
    with pytest.raises(ModelNotReady, match="no version under alias 'production'"):
        registry.get("a")


def test_a_stopping_service_is_not_ready():
    registry = holding(snapshot(a=ready("a")))
    registry.draining = True

    assert registry.not_ready() == "the service is stopping"
