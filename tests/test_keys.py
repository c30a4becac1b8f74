import hashlib

import pytest

from app.keys import Key, find, parse

ANN, BOB = "a-secret-of-anns-own", "another-secret-of-bobs"


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def test_keys_are_read_with_and_without_names_and_as_digests():
    text = f"ann:{ANN}, bob:sha256:{digest(BOB)},sha256:{digest('x' * 16).upper()} , {'y' * 16},"

    assert parse(text, "key") == (
        Key.of("ann", ANN),
        Key.of("bob", BOB),
        Key.of("key-3", "x" * 16),
        Key.of("key-4", "y" * 16),
    )


def test_a_name_may_have_two_keys_while_one_takes_the_place_of_the_other():
    assert [key.name for key in parse(f"ann:{ANN},ann:{BOB}", "key")] == ["ann", "ann"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ann:short", "key 1: expected 16 to 500 characters, got 5: make one with `python -c"),
        (f"ok:{ANN},ann:{'x' * 501}", "key 2: expected 16 to 500 characters, got 501"),
        (f"ann:{ANN},bob:{ANN}", "key 2: it is the same as that of ann"),
        (f"ann:{ANN},bob:sha256:{digest(ANN)}", "key 2: it is the same as that of ann"),
        ("sha256:abc", "key 1: expected 64 hexadecimal digits behind sha256:, got 3 characters"),
        (f"{'-' * 20}:{ANN}", "key 1: expected letters, digits"),
        ("ann:" + "é" * 20, "key 1: expected letters, digits and signs without blanks"),
        ("ann:twice the blanks here", "key 1: expected letters, digits and signs without blanks"),
        (",".join(f"{number:016}" for number in range(1001)), "expected at most 1000 keys, got 1001"),
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(text, why):
    with pytest.raises(ValueError, match=".") as raised:
        parse(text, "key")

    assert str(raised.value).startswith(why)
    assert not any(secret in str(raised.value) for secret in (ANN, "x" * 20, "blanks here", "é"))


def test_a_key_is_found_by_its_whole_secret_only():
    keys = parse(f"ann:{ANN},bob:{BOB}", "key")

    assert find(BOB.encode(), keys) == keys[1]
    for secret in (b"", BOB[:-1].encode(), BOB.upper().encode(), digest(BOB).encode(), keys[1].digest, b"\xff" * 20):
        assert find(secret, keys) is None
