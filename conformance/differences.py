"""What a server is known to do otherwise than R2: the tests that must fail because of it. docs/storage.md says more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """`kind` fails the `tests` because of `why`; seen in `version`, and perhaps gone in others."""

    kind: str
    version: str
    why: str
    tests: frozenset[str]


DIFFERENCES = (
    Difference(
        "radosgw",
        "16.2.15",
        "a PUT with If-Match is refused even for the right ETag, because its quotes are compared too",
        frozenset(
            {
                "test_put_if_match_replaces_only_what_the_caller_saw",
                "test_of_many_writers_that_saw_the_same_one_wins",
                "test_our_own_write_is_recognised_when_its_answer_was_lost[if_match-dropped]",
                "test_our_own_write_is_recognised_when_its_answer_was_lost[if_match-500]",
                "test_our_own_write_is_recognised_when_its_answer_was_lost[if_match-503]",
            }
        ),
    ),
)
