"""Texts and records as rows of counts that are mostly zero."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, override

import numpy as np

from app.compiled.numeric import normalized
from app.compiled.op import Malformed, Op, expect
from app.compiled.patterns import is_linear
from app.compiled.steps import MAX_WIDTH
from app.compiled.values import Sparse, dense
from app.signature import Array

MAX_NGRAM = 64
MANY_TERMS = 1 << 16  # from here on, terms are made one by one as they are looked up
_WHITE_SPACES = re.compile(r"\s\s+")


@dataclass(frozen=True, eq=False)
class CountTerms(Op, kind="count_terms"):
    """How often each term of a vocabulary is in each text.

    The terms of a text are what `pattern` finds, or the characters of the whole text or of its words (`char_wb`); then sequences of
    `shortest` to `longest` of them. The pattern is one that `is_linear`: `re` lets nobody else have the interpreter meanwhile.
    """

    analyzer: Literal["word", "char", "char_wb"]
    shortest: int
    longest: int
    lowercase: bool
    accents: Literal["ascii", "unicode"] | None
    pattern: str
    stop_words: tuple[str, ...] | None
    vocabulary: dict[str, int]
    width: int
    binary: bool

    @override
    def check(self) -> None:
        expect(1 <= self.shortest <= self.longest <= MAX_NGRAM, "its terms have no length")
        expect(0 < self.width <= MAX_WIDTH, "its width is none")
        expect(all(0 <= index < self.width for index in self.vocabulary.values()), "a term has no column")
        expect(self.analyzer != "word" or is_linear(self.pattern), "its pattern may take for ever")
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, RecursionError) as error:
            raise Malformed(f"is not a compiled model: its pattern is none: {error}") from error
        expect(groups <= 1, "its pattern has several groups")

    @functools.cached_property
    def _find(self) -> Callable[[str], list[str]]:
        return re.compile(self.pattern).findall

    @functools.cached_property
    def _stopped(self) -> frozenset[str]:
        return frozenset(self.stop_words or ())

    def _terms(self, text: Any) -> Iterable[str]:
        if text is np.nan:
            raise ValueError("np.nan is an invalid document, expected byte or unicode string.")
        if self.lowercase:
            text = text.lower()
        if self.accents is not None:
            text = _without_accents(text, self.accents)
        if self.analyzer == "word":
            tokens = self._find(text)
            if self._stopped:
                stopped = self._stopped
                tokens = [token for token in tokens if token not in stopped]
            return tokens if self.longest == 1 else self._word_ngrams(tokens)
        text = _WHITE_SPACES.sub(" ", text)
        return self._characters(text) if self.analyzer == "char" else self._characters_of_words(text)

    def _word_ngrams(self, tokens: list[str]) -> Iterable[str]:
        count = len(tokens)
        if count * self.longest > MANY_TERMS:
            return _each(tokens, self.shortest, self.longest, " ".join)
        terms = list(tokens) if self.shortest == 1 else []
        for length in range(max(2, self.shortest), min(self.longest, count) + 1):
            terms += [" ".join(tokens[start : start + length]) for start in range(count - length + 1)]
        return terms

    def _characters(self, text: str) -> Iterable[str]:
        count = len(text)
        if count * self.longest > MANY_TERMS:
            return _each(text, self.shortest, self.longest, str)
        terms = list(text) if self.shortest == 1 else []
        for length in range(max(2, self.shortest), min(self.longest, count) + 1):
            terms += [text[start : start + length] for start in range(count - length + 1)]
        return terms

    def _characters_of_words(self, text: str) -> Iterable[str]:
        if len(text) * self.longest > MANY_TERMS:
            return self._each_of_words(text)
        terms: list[str] = []
        for word in text.split():
            padded = f" {word} "
            count = len(padded)
            for length in range(self.shortest, self.longest + 1):
                terms += [padded[start : start + length] for start in range(max(1, count - length + 1))]
                if length >= count:  # a short word counts once
                    break
        return terms

    def _each_of_words(self, text: str) -> Iterator[str]:
        for word in text.split():
            padded = f" {word} "
            count = len(padded)
            for length in range(self.shortest, self.longest + 1):
                for start in range(max(1, count - length + 1)):
                    yield padded[start : start + length]
                if length >= count:
                    break

    @override
    def run(self, value: Any) -> Sparse:
        get = self.vocabulary.get
        columns: list[int] = []
        data: list[int] = []
        lengths: list[int] = []
        for text in value.tolist():
            counts: dict[int, int] = {}
            for term in self._terms(text):
                index = get(term)
                if index is not None:
                    counts[index] = counts.get(index, 0) + 1
            found = sorted(counts)
            columns += found
            data += [counts[index] for index in found]
            lengths.append(len(found))
        numbers = np.ones(len(data)) if self.binary else np.array(data, dtype=np.float64)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        return Sparse(len(lengths), self.width, rows, np.array(columns, dtype=np.intp), numbers)


def _each(items: Any, shortest: int, longest: int, joined: Callable[[Any], str]) -> Iterator[str]:
    """Yield what is `joined` of each sequence of `shortest` to `longest` items: of a long text, all at once would fill the memory."""
    count = len(items)
    for length in range(shortest, min(longest, count) + 1):
        for start in range(count - length + 1):
            yield joined(items[start : start + length])


def _without_accents(text: str, how: str) -> str:
    if text.isascii():
        return text
    decomposed = unicodedata.normalize("NFKD", text)
    if how == "ascii":
        return decomposed.encode("ascii", "ignore").decode("ascii")
    return "".join(character for character in decomposed if not unicodedata.combining(character))


@dataclass(frozen=True, eq=False)
class Tfidf(Op, kind="tfidf"):
    """Counts weighed by how rare their terms are, and rows divided by their norms."""

    sublinear: bool
    weights: Array | None
    norm: Literal["l1", "l2"] | None

    @override
    def check(self) -> None:
        expect(
            self.weights is None or (self.weights.ndim == 1 and self.weights.dtype == np.float64), "it has no weights"
        )

    @override
    def run(self, value: Any) -> Sparse:
        if not isinstance(value, Sparse):
            rows, columns = np.nonzero(value)
            value = Sparse(len(value), value.shape[1], rows, columns, value[rows, columns])
        data = value.data
        if self.sublinear:
            data = np.log(data) + 1.0
        if self.weights is not None:
            data = data * self.weights[value.columns]
        value = value.with_data(data)
        return value if self.norm is None else normalized(value, self.norm)


@dataclass(frozen=True, eq=False)
class Fields(Op, kind="fields"):
    """The fields of records, each in its column: numbers as they are, words as a 1 in the column of field and word."""

    vocabulary: Mapping[str, int]
    width: int
    separator: str
    sparse: bool

    @override
    def check(self) -> None:
        expect(0 < self.width <= MAX_WIDTH, "its width is none")
        expect(all(0 <= index < self.width for index in self.vocabulary.values()), "a field has no column")

    @override
    def run(self, value: Any) -> Any:
        columns: list[int] = []
        data: list[float] = []
        lengths: list[int] = []
        for record in value.tolist():
            found: dict[int, float] = {}
            for name, given in record.items():
                for key, number in self._pairs(name, given):
                    index = self.vocabulary.get(key)
                    if index is not None:
                        found[index] = found.get(index, 0.0) + number
            order = sorted(found)
            columns += order
            data += [found[index] for index in order]
            lengths.append(len(order))
        rows = np.repeat(np.arange(len(lengths)), lengths)
        result = Sparse(
            len(lengths), self.width, rows, np.array(columns, dtype=np.intp), np.array(data, dtype=np.float64)
        )
        return result if self.sparse else dense(result)

    def _pairs(self, name: str, given: Any) -> list[tuple[str, float]]:
        if isinstance(given, str):
            return [(f"{name}{self.separator}{given}", 1.0)]
        if given is None:
            return [(name, np.nan)]
        if isinstance(given, list):
            return [(f"{name}{self.separator}{word}", 1.0) for word in given]
        return [(name, float(given))]
