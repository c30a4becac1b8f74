"""The index as a value: what an alias goes back to, which labels are free, and what other releases make of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidIndex, NothingToRollBackTo, UnknownVersion, VersionExists, VersionInUse
from app.index import HISTORY_LENGTH, MAX_INDEX_BYTES, Index, VersionEntry

AT = "2026-11-21T20:00:00+00:00"
ENTRY = VersionEntry(created=AT, manifest_sha256="0")


def index(*versions: str) -> Index:
    made = Index()
    for version in versions:
        made = made.with_version("a", version, ENTRY)
    return made


def promoted(made: Index, *versions: str) -> Index:
    for version in versions:
        made = made.with_alias("a", "production", version, at=AT, by="ann@laptop")
    return made


def back(made: Index) -> Index:
    return made.rolled_back("a", "production", at=AT, by="bob@ci")[0]


def production(made: Index) -> str:
    return made.models["a"].aliases["production"]


@given(
    st.lists(st.sampled_from(["1", "2", "3", "4", "back", "unpublish 1", "unpublish 3"]), max_size=HISTORY_LENGTH - 1)
)
def test_rolling_back_undoes_moves_as_a_stack_does(steps):
    made, stack, there = promoted(index("1", "2", "3", "4"), "1"), ["1"], {"1", "2", "3", "4"}
    for step in steps:
        if step == "back":
            below = next((n for n in range(len(stack) - 2, -1, -1) if stack[n] in there - {stack[-1]}), None)
            if below is None:
                with pytest.raises(NothingToRollBackTo):
                    back(made)
            else:
                made, stack = back(made), stack[: below + 1]
        elif step.startswith("unpublish"):
            label = step.split()[1]
            if label in there - {stack[-1]}:
                made = made.without_version("a", label, at=AT)
                there.discard(label)
        elif step in there and step != stack[-1]:
            made = promoted(made, step)
            stack.append(step)

        assert production(made) == stack[-1]
        assert Index.decode(made.encode()) == made


def test_rolling_back_twice_goes_two_versions_back_and_not_forth_again():
    made = promoted(index("1", "2", "3"), "1", "2", "3")

    assert production(back(made)) == "2"
    assert production(back(back(made))) == "1"
    with pytest.raises(NothingToRollBackTo, match="a: production names 1, .* there is 1, 2, 3: promote one of them"):
        back(back(back(made)))


def test_a_version_that_was_unpublished_since_is_passed_over_and_named():
    made = promoted(index("1", "2", "3"), "1", "2", "3").without_version("a", "2", at=AT)
    made, skipped = made.rolled_back("a", "production", at=AT)

    assert (production(made), skipped) == ("1", ("2",))


def test_an_alias_has_a_history_of_its_own():
    made = promoted(index("1", "2"), "1", "2").with_alias("a", "staging", "2", at=AT)

    assert production(back(made)) == "1"
    assert back(made).models["a"].aliases["staging"] == "2"
    with pytest.raises(NothingToRollBackTo, match="staging names 2"):
        made.rolled_back("a", "staging", at=AT)
    with pytest.raises(UnknownVersion, match="a has no alias 'canary'; there is production, staging"):
        made.rolled_back("a", "canary", at=AT)


def test_of_a_long_history_the_latest_moves_are_kept_and_can_be_undone():
    made = promoted(index("1", "2"), *["1", "2"] * HISTORY_LENGTH)
    assert len(made.models["a"].history["production"]) == HISTORY_LENGTH
    made = back(made)

    assert production(made) == "1"
    assert production(back(made)) == "2"


def test_a_move_that_somebody_made_by_hand_can_be_undone_too():
    made = json.loads(promoted(index("1", "2", "3"), "1", "2").encode())
    made["models"]["a"]["aliases"]["production"] = "3"

    assert production(back(Index.decode(json.dumps(made).encode()))) == "2"


def test_only_a_rollback_says_that_it_is_one():
    moves = json.loads(back(promoted(index("1", "2"), "1", "2")).encode())["models"]["a"]["history"]["production"]

    assert ["rollback" in move for move in moves] == [False, False, True]
    assert moves[-1] == {"version": "1", "previous": "2", "at": AT, "by": "bob@ci", "rollback": True}


def test_a_label_is_not_free_again_after_its_version_was_unpublished():
    made = index("1", "2", "spring").without_version("a", "2", at=AT, by="ann@laptop")

    assert made.next_version("a") == "3"
    with pytest.raises(VersionExists, match=r"a/2 was unpublished by ann@laptop at .*: labels are not used again"):
        made.with_version("a", "2", ENTRY)
    with pytest.raises(
        UnknownVersion, match=r"a has no version '2': it was unpublished by ann@laptop at 20.*; there is 1"
    ):
        promoted(made, "2")


def test_what_an_alias_names_stays_unless_the_alias_may_go_too():
    made = promoted(index("1", "2"), "1")
    with pytest.raises(VersionInUse, match=r"a/1 is in use: production of a names it; let the alias name another"):
        made.without_version("a", "1", at=AT)
    alone = made.without_version("a", "2", at=AT)
    with pytest.raises(VersionInUse, match="it is the only version; --drop-aliases takes the model out of service"):
        alone.without_version("a", "1", at=AT)
    gone = alone.without_version("a", "1", at=AT, drop_aliases=True).models["a"]

    assert (gone.versions, gone.aliases) == ({}, {})
    assert [move.version for move in gone.history["production"]] == ["1"]
    assert list(gone.unpublished) == ["2", "1"]


def test_names_and_versions_that_are_not_there_are_told_with_those_that_are():
    with pytest.raises(UnknownVersion, match="there is no published model 'b'; there is a"):
        index("1").entry("b")
    with pytest.raises(UnknownVersion, match="there is no published model 'b'; there is nothing"):
        Index().entry("b")
    with pytest.raises(UnknownVersion, match="a has no version '7'; there is 1, 2"):
        index("1", "2").entry("a", "7")


def of(entry: dict[str, object], name: str = "a") -> bytes:
    return json.dumps({"format": 1, "models": {name: entry}}).encode()


STORED = {"created": AT, "manifest_sha256": "0"}


@pytest.mark.parametrize(
    "body",
    [
        of({}, name="../a"),
        of({"versions": {"../../x": STORED}}),
        of({"versions": {"1": STORED}, "aliases": {"a b": "1"}}),
        of({"unpublished": {"../../x": {"at": AT}}}),
        of({"unpublished": {"9" * 5000: {"at": AT}}}),
        of({"history": {"a b": []}}),
        of({"history": {"production": [{"version": "../x", "at": AT}]}}),
        of({"history": {"production": [{"version": "1", "previous": "../x", "at": AT}]}}),
    ],
)
def test_every_label_and_alias_in_it_must_be_one(body):
    with pytest.raises(InvalidIndex, match="cannot be the name of a model, a version or an alias"):
        Index.decode(body)


@pytest.mark.parametrize("entry", [{}, {"versions": {"x" * 3_000_000: 1}}])
def test_what_is_wrong_is_told_without_all_that_somebody_wrote_there(entry):
    with pytest.raises(InvalidIndex) as caught:
        Index.decode(of(entry, name="a b" * 1_000_000))

    assert len(str(caught.value)) < 500


def test_labels_that_are_there_by_the_thousand_are_not_all_told():
    made = index("1").model_copy()
    entry = made.models["a"].model_copy(update={"versions": {str(number): ENTRY for number in range(2000)}})
    made = made.model_copy(update={"models": {"a": entry}})
    with pytest.raises(UnknownVersion, match=r"there is 0, 1, .*, 49 and 1,950 more$"):
        made.entry("a", "none")


def test_a_number_that_nobody_has_counted_to_is_a_label_like_any_other():
    assert index("3", "9" * 100).next_version("a") == "4"
    assert index("3").without_version("a", "3", at=AT).with_version("a", "9" * 19, ENTRY).next_version("a") == "4"
    assert index("9" * 18, "1" + "0" * 18).next_version("a") == "1" + "0" * 17 + "1"


def test_an_index_that_nobody_needs_so_large_is_not_parsed():
    with pytest.raises(InvalidIndex, match="it has more than 8,388,608 bytes"):
        Index.decode(b" " * (MAX_INDEX_BYTES - 20) + Index().encode())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "the whole: Invalid JSON"),
        (b"[]", "the whole: Input should be"),
        (b"{}", "format: Field required"),
        (b'{"models": {}}', "format: Field required"),
        (b'{"format": 1}', "models: Field required"),
        (b'{"format": "x", "models": {}}', "format: Input should be a valid integer"),
        (b'{"format": 0, "models": {}}', "has format 0, this release reads up to 1"),
        (b'{"format": 2, "models": {}}', "has format 2, this release reads up to 1: upgrade Diskless"),
        (b'{"format": 2, "models": ["a"]}', "has format 2, this release reads up to 1: upgrade Diskless"),
        (b'{"format": 1, "models": {"a": 1}}', "models.a: Input should be"),
    ],
)
def test_what_is_no_index_of_this_release_is_told(body, told):
    with pytest.raises(InvalidIndex) as caught:
        Index.decode(body)

    assert told in str(caught.value)


def test_a_name_whose_versions_all_went_is_not_published():
    made = index("1").with_version("b", "1", ENTRY).without_version("a", "1", at=AT)

    assert (list(made.models), list(made.published)) == (["a", "b"], ["b"])
