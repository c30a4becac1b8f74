"""The seal: what it proves, what it is worth after any change, and what a person is told about keys."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from app.errors import ForeignSeal, InvalidSeal, SealBroken, SealError, SealMissing
from app.seal import (
    PREFIX,
    PRIVATE,
    PrivateKey,
    PublicKey,
    TrustedKeys,
    keygen,
    parse_trusted_keys,
    public_key_of,
    read_private_key,
    read_public_key,
    seal,
    verify,
)
from tests.service import ROOT

# RFC 8032, section 7.1, TEST 1 and TEST 3
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]
MANIFEST = b'{"format": 1, "name": "churn", "version": "7", "artifacts": [{"sha256": "9f86d081"}]}'
KEY = PrivateKey(bytes(range(32)))  # always the same: pytest names tests by their parameters
PRIVATE_TEXT = PRIVATE + base64.urlsafe_b64encode(KEY.raw).rstrip(b"=").decode()
PUBLIC_TEXT = str(public_key_of(KEY))
OTHER_PUBLIC_TEXT = str(public_key_of(PrivateKey(bytes(range(1, 33)))))
TRUSTED = parse_trusted_keys(PUBLIC_TEXT)
SEAL = seal(MANIFEST, KEY)


def other() -> tuple[PrivateKey, str]:
    private, public = keygen()
    return read_private_key(private), public


@pytest.mark.parametrize(("private", "public", "message", "signature"), RFC_8032)
def test_keys_and_signatures_are_those_of_rfc_8032(private, public, message, signature):
    key = public_key_of(PrivateKey(bytes.fromhex(private)))

    assert key.raw.hex() == public
    Ed25519PublicKey.from_public_bytes(key.raw).verify(bytes.fromhex(signature), bytes.fromhex(message))


@pytest.mark.parametrize(("private", "public", "message", "signature"), RFC_8032)
def test_a_bare_signature_of_the_same_key_is_no_seal(private, public, message, signature):
    key = PrivateKey(bytes.fromhex(private))
    forged = json.loads(seal(MANIFEST, key))
    bare = Ed25519PrivateKey.from_private_bytes(key.raw).sign(MANIFEST)
    forged["signature"] = base64url(bare)
    trusted = parse_trusted_keys(str(public_key_of(key)))

    with pytest.raises(SealBroken):
        verify(MANIFEST, json.dumps(forged, indent=1).encode(), trusted, "churn/7")


def base64url(raw: bytes) -> str:
    """base64url without padding, written down a second time."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    bits = "".join(f"{byte:08b}" for byte in raw)
    return "".join(alphabet[int(bits[i : i + 6].ljust(6, "0"), 2)] for i in range(0, len(bits), 6))


def test_a_seal_is_valid_under_its_key_and_says_so_by_name_or_id():
    named = parse_trusted_keys(f"ci:{PUBLIC_TEXT}")

    assert verify(MANIFEST, SEAL, TRUSTED, "churn/7") == public_key_of(KEY).id
    assert verify(MANIFEST, SEAL, named, "churn/7") == "ci"


def test_a_seal_is_small_json_with_format_algorithm_key_and_signature():
    fields = json.loads(SEAL)

    assert fields.keys() == {"format", "algorithm", "key", "signature"}
    assert (fields["format"], fields["algorithm"], fields["key"]) == (1, "ed25519", public_key_of(KEY).id)
    assert len(SEAL) < 200


def test_sealing_the_same_bytes_again_gives_the_same_seal():
    assert seal(MANIFEST, KEY) == SEAL


def test_no_flipped_bit_of_the_manifest_is_accepted():
    for position in range(len(MANIFEST) * 8):
        altered = bytearray(MANIFEST)
        altered[position // 8] ^= 1 << position % 8
        with pytest.raises(SealBroken):
            verify(bytes(altered), SEAL, TRUSTED, "churn/7")


def test_no_flipped_bit_of_the_seal_is_accepted():
    for position in range(len(SEAL) * 8):
        altered = bytearray(SEAL)
        altered[position // 8] ^= 1 << position % 8
        with pytest.raises(SealError):
            verify(MANIFEST, bytes(altered), TRUSTED, "churn/7")


def test_no_beginning_of_a_seal_and_nothing_longer_is_accepted():
    for altered in [SEAL[:size] for size in range(len(SEAL))] + [SEAL + b" ", SEAL + b"\n", b" " + SEAL, SEAL + SEAL]:
        with pytest.raises(InvalidSeal):
            verify(MANIFEST, altered, TRUSTED, "churn/7")


def test_a_manifest_that_was_cut_or_continued_is_not_the_sealed_one():
    for altered in (b"", MANIFEST[:-1], MANIFEST + b" ", b"\n" + MANIFEST):
        with pytest.raises(SealBroken):
            verify(altered, SEAL, TRUSTED, "churn/7")


def test_the_prefix_is_not_taken_for_a_part_of_the_manifest():
    with pytest.raises(SealBroken):
        verify(MANIFEST, seal(PREFIX + MANIFEST, KEY), TRUSTED, "churn/7")


def test_the_seal_of_another_version_is_broken_here():
    eighth = MANIFEST.replace(b'"7"', b'"8"')

    with pytest.raises(SealBroken, match=r"^churn/8: its seal, of key .* was altered or exchanged after sealing"):
        verify(eighth, SEAL, TRUSTED, "churn/8")


def test_a_missing_seal_is_said_to_be_missing():
    with pytest.raises(SealMissing, match=r"^churn/7: has no seal.*--seal-key"):
        verify(MANIFEST, None, TRUSTED, "churn/7")


def test_a_foreign_seal_names_its_key_and_the_trusted_ones():
    stranger, _ = other()
    named = parse_trusted_keys(f"ci:{PUBLIC_TEXT},{other()[1]}")

    with pytest.raises(ForeignSeal) as caught:
        verify(MANIFEST, seal(MANIFEST, stranger), named, "churn/7")

    text = str(caught.value)
    assert f"sealed with key {public_key_of(stranger).id}" in text
    assert all(known in text for known in named)
    assert f"ci ({public_key_of(KEY).id})" in text


def test_a_stranger_who_writes_a_trusted_key_id_is_not_trusted():
    stranger, _ = other()
    forged = json.loads(seal(MANIFEST, stranger)) | {"key": public_key_of(KEY).id}

    with pytest.raises(SealBroken):
        verify(MANIFEST, json.dumps(forged, indent=1).encode(), TRUSTED, "churn/7")


def test_who_trusts_nobody_is_told_so():
    with pytest.raises(ForeignSeal, match="trusted are none"):
        verify(MANIFEST, SEAL, TrustedKeys(), "churn/7")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 0},
        {"format": "1"},
        {"format": True},
        {"format": 1.0},
        {"algorithm": "none"},
        {"algorithm": "ED25519"},
        {"algorithm": None},
        {"key": None},
        {"key": public_key_of(KEY).id.upper()},
        {"key": [public_key_of(KEY).id]},
        {"signature": None},
        {"signature": ""},
        {"signature": json.loads(SEAL)["signature"] + "=="},
        {"signature": json.loads(SEAL)["signature"] + "A"},
        {"signature": json.loads(SEAL)["signature"][:-4] + "\u00e9\u00e9\u00e9\u00e9"},
        {"comment": "more than there should be"},
    ],
)
def test_a_field_that_is_not_as_it_is_written_makes_it_no_seal(change):
    altered = json.dumps(json.loads(SEAL) | change, indent=1).encode()

    if altered != SEAL:
        with pytest.raises(InvalidSeal):
            verify(MANIFEST, altered, TRUSTED, "churn/7")


@pytest.mark.parametrize(
    "altered",
    [
        b"",
        b"null",
        b"[]",
        b'"ed25519"',
        b"\xff\xfe",
        b"[" * 1000,
        b"9" * 1000,
        b"1e999",
        b"{}",
        SEAL.replace(b"\n", b""),
        SEAL.replace(b'"format": 1,', b'"format": 1, "format": 1,'),
        SEAL.replace(b"ed25519", b"\\u0065d25519"),
        b" " * 2000,
    ],
)
def test_what_is_written_another_way_is_no_seal(altered):
    with pytest.raises(InvalidSeal, match=r"^churn/7: its seal "):
        verify(MANIFEST, altered, TRUSTED, "churn/7")


def test_a_seal_of_a_later_format_says_to_upgrade():
    later = json.dumps({"format": 2, "signatures": []}).encode()

    with pytest.raises(InvalidSeal, match="format 2, this release reads 1: upgrade Diskless"):
        verify(MANIFEST, later, TRUSTED, "churn/7")


def test_the_second_signature_of_the_same_bytes_is_refused():
    """RFC 8032, section 5.1.7: S + L would verify too, if it were not refused for being too large."""
    order = 2**252 + 27742317777372353535851937790883648493
    raw = Ed25519PrivateKey.from_private_bytes(KEY.raw).sign(PREFIX + MANIFEST)
    number = int.from_bytes(raw[32:], "little") + order
    forged = json.loads(SEAL) | {"signature": base64url(raw[:32] + number.to_bytes(32, "little"))}

    with pytest.raises(SealBroken):
        verify(MANIFEST, json.dumps(forged, indent=1).encode(), TRUSTED, "churn/7")


def test_during_a_rotation_the_seals_of_both_keys_are_accepted():
    new, new_text = other()
    both = parse_trusted_keys(f" old:{PUBLIC_TEXT} , new:{new_text}, ")
    after = parse_trusted_keys(f"new:{new_text}")

    assert verify(MANIFEST, SEAL, both, "churn/7") == "old"
    assert verify(MANIFEST, seal(MANIFEST, new), both, "churn/7") == "new"
    assert verify(MANIFEST, seal(MANIFEST, new), after, "churn/7") == "new"
    with pytest.raises(ForeignSeal):
        verify(MANIFEST, SEAL, after, "churn/7")


def test_keygen_prints_a_pair_that_belongs_together_and_is_new_each_time():
    private, public = keygen()

    assert str(public_key_of(read_private_key(private))) == public
    assert private.startswith("diskless-private-")
    assert public.startswith("diskless-public-")
    assert private != PRIVATE_TEXT
    assert not set(private + public) & set(" ,:=+/$'\"\\")


def test_blanks_around_a_key_are_no_part_of_it():
    assert read_private_key(f"  {PRIVATE_TEXT}\n") == KEY
    assert str(read_public_key(f" {PUBLIC_TEXT}\n")) == PUBLIC_TEXT


def test_a_private_key_is_not_in_its_representation():
    assert PRIVATE_TEXT.removeprefix("diskless-private-") not in repr(KEY)
    assert "raw" not in repr(KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "diskless-private-",
        PRIVATE_TEXT[:-1],
        PRIVATE_TEXT + "A",
        PRIVATE_TEXT + "=",
        PRIVATE_TEXT.removeprefix("diskless-private-"),
        PRIVATE_TEXT.upper(),
        PRIVATE_TEXT[:-1] + "B",  # the last two bits of the last digit belong to no byte
        PRIVATE_TEXT[:30] + " " + PRIVATE_TEXT[31:],
        "-----BEGIN PRIVATE KEY-----",
    ],
)
def test_a_text_that_is_no_private_key_is_refused_without_being_shown(text):
    with pytest.raises(ValueError, match=r"^expected a private key as .python -m app keygen. prints it") as caught:
        read_private_key(text)

    assert "got" not in str(caught.value)


def test_a_public_key_in_the_place_of_a_private_one_is_called_so():
    with pytest.raises(ValueError, match="got a public one: take the one that begins with diskless-private-"):
        read_private_key(PUBLIC_TEXT)


@pytest.mark.parametrize("text", [PRIVATE_TEXT, f"ci:{PRIVATE_TEXT}", f"{PUBLIC_TEXT},{PRIVATE_TEXT}"])
def test_a_private_key_among_the_trusted_ones_is_refused_without_being_shown(text):
    with pytest.raises(ValueError, match="got a private one, which no server should have") as caught:
        parse_trusted_keys(text)

    assert PRIVATE_TEXT.removeprefix("diskless-private-") not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ci", "expected a public key as .* got 'ci'"),
        ("ci:", "expected a public key as .* got ''"),
        (PUBLIC_TEXT[:-1], "expected a public key as"),
        (PUBLIC_TEXT + "=", "expected a public key as"),
        (PUBLIC_TEXT.replace("diskless-public-", ""), "expected a public key as"),
        (f"{PUBLIC_TEXT};{PUBLIC_TEXT}", "expected a public key as"),
        (f"{PUBLIC_TEXT} {PUBLIC_TEXT}", "expected a public key as"),
        ("x" * 1000, "got 'x+…'"),
        (f"c i:{PUBLIC_TEXT}", "got the name 'c i'"),
        (f":{PUBLIC_TEXT}", "got the name ''"),
        (f"ci:ci:{PUBLIC_TEXT}", "got the name 'ci:ci'"),
        (f"a:{PUBLIC_TEXT},b:{PUBLIC_TEXT}", "expected each key once, got [0-9a-f]{16} twice"),
        (f"a:{PUBLIC_TEXT},a:{OTHER_PUBLIC_TEXT}", "expected each name once, got 'a' for two keys"),
    ],
)
def test_malformed_trusted_keys_are_refused_with_what_is_wrong(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_trusted_keys(text)


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_no_keys_are_no_trust(text):
    assert list(parse_trusted_keys(text)) == []
    assert len(parse_trusted_keys(text)) == 0


@pytest.mark.parametrize(
    "y",
    [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18, 2**255 - 1]
    + [
        int.from_bytes(bytes.fromhex(point), "little")
        for point in (
            "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
            "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        )
    ],
)
@pytest.mark.parametrize("sign", [0, 1])
def test_a_key_under_which_anybody_can_seal_is_refused(y, sign):
    raw = (y | sign << 255).to_bytes(32, "little")

    with pytest.raises(ValueError, match="expected a public key, got bytes that are none"):
        PublicKey(raw)
    with pytest.raises(ValueError, match="got bytes that are none.*diskless-public-"):
        parse_trusted_keys("diskless-public-" + base64url(raw))


def test_bytes_that_are_no_point_of_the_curve_are_refused():
    half = [accepts(y.to_bytes(32, "little")) for y in range(2, 202)]

    assert 70 < sum(half) < 130  # every other y has an x
    assert all(accepts(public_key_of(other()[0]).raw) for _ in range(50))
    assert not accepts(b"")
    assert not accepts(bytes(31))


def accepts(raw: bytes) -> bool:
    try:
        PublicKey(raw)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_private_key_has_32_bytes(size):
    with pytest.raises(ValueError, match=f"got {size}"):
        PrivateKey(bytes(size))


def test_cryptography_is_imported_only_when_a_seal_is_made_or_checked():
    code = (
        f"import sys; from app.seal import *; parse_trusted_keys({PUBLIC_TEXT!r}); print('cryptography' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)

    assert run.stdout == "False\n"
