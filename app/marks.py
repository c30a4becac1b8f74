"""Which texts would take too long to normalise.

Unicode puts combining characters that follow each other into an order of their own. `unicodedata.normalize`, which takes the
accents off texts here and in scikit-learn, does so in a time that grows with the square of their number, and lets nobody else
have the interpreter meanwhile: half a million of them take minutes. No language has more than a few in a row.
"""

from __future__ import annotations

import functools
import re
import unicodedata

MAX_MARKS = 100  # combining characters in a row; Unicode calls text with 30 at most "stream-safe"
EXPECTED = f"a text with at most {MAX_MARKS} combining characters in a row"
GOT = "more than that"

LEAST_BYTES = 2 * MAX_MARKS  # of JSON with more of them than that: each is two bytes or more, as an escape six
_END = 0x20000  # there are none beyond the first two planes


def has_long_run(text: str) -> bool:
    """Whether there are more combining characters in a row in a text than may be.

    A run of more than 100 has a character at a multiple of 101: only what is around those is looked at, if it is one.
    """
    if len(text) <= MAX_MARKS or text.isascii():
        return False
    step = MAX_MARKS + 1
    seen = text[MAX_MARKS::step]
    if seen.isascii():
        return False
    for place, character in enumerate(seen):
        if is_mark(character):
            position = MAX_MARKS + place * step
            behind = text[position - MAX_MARKS : position][::-1]  # begins with the one before it
            if _run(text, position) + _run(behind, 0) > MAX_MARKS:
                return True
    return False


def is_mark(character: str) -> bool:
    """Whether a character is a combining one, or becomes nothing but such by a decomposition.

    A few become so that are none themselves: the sound marks of halfwidth katakana, and some vowels of Tibetan.
    """
    if unicodedata.combining(character):
        return True
    return unicodedata.decomposition(character) != "" and all(
        map(unicodedata.combining, unicodedata.normalize("NFKD", character))
    )


def _run(text: str, start: int) -> int:
    """Return how many combining characters follow each other from `start` on; it stops counting at one too many."""
    found = _marks().match(text, start)
    return found.end() - start if found else 0


@functools.cache
def _marks() -> re.Pattern[str]:
    marks = "".join(character for character in map(chr, range(_END)) if is_mark(character))
    return re.compile(f"[{marks}]{{1,{MAX_MARKS + 1}}}")
