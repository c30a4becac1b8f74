"""Translations of what makes rows of counts from texts and records."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.compiled.op import Op
from app.compiled.patterns import is_linear
from app.compiled.text import MAX_NGRAM, CountTerms, Fields, Tfidf
from app.compiler.pipeline import checked, then
from app.compiler.preprocessing import floats
from app.compiler.translation import Flow, NotCompilable, transforms


@transforms("sklearn.feature_extraction.text.CountVectorizer")
def _counts(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    return _terms(estimator, flow)


@transforms("sklearn.feature_extraction.text.TfidfVectorizer")
def _tfidf_vectorizer(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    counts, made = _terms(estimator, flow)
    return then([counts], _weights(estimator._tfidf)), Flow("sparse", made.width, whole=True, bounded=True)


def _terms(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    name = type(estimator).__name__
    if flow.kind != "texts":
        raise NotCompilable(f"its {name} would read {flow.kind}")
    if estimator.analyzer not in ("word", "char", "char_wb") or estimator.input != "content":
        raise NotCompilable(f"its {name} has an analyzer that only Python can compute")
    if estimator.preprocessor is not None or (estimator.tokenizer is not None and estimator.analyzer == "word"):
        raise NotCompilable(f"its {name} has a function that only Python can compute")
    if estimator.strip_accents not in (None, False, "ascii", "unicode"):
        raise NotCompilable(f"its {name} has a function that only Python can compute")
    shortest, longest = (int(length) for length in estimator.ngram_range)
    pattern = estimator.token_pattern if estimator.analyzer == "word" else ""
    if longest > MAX_NGRAM:
        raise NotCompilable(f"its {name} has terms that are too long")
    if estimator.analyzer == "word" and not is_linear(pattern):
        raise NotCompilable(f"its {name} has a token pattern that might take for ever on some texts")
    dtype = np.dtype(estimator.dtype).name
    if dtype in ("float32", "float16"):
        raise NotCompilable(f"its {name} counts in {dtype}, and scikit-learn would compute with as few digits")
    stop_words = estimator.get_stop_words() if estimator.analyzer == "word" else None
    operation = CountTerms(
        analyzer=estimator.analyzer,
        shortest=shortest,
        longest=longest,
        lowercase=bool(estimator.lowercase),
        accents=estimator.strip_accents or None,
        pattern=pattern,
        stop_words=None if stop_words is None else tuple(sorted(stop_words)),
        vocabulary={str(term): int(column) for term, column in estimator.vocabulary_.items()},
        width=len(estimator.vocabulary_),
        binary=bool(estimator.binary),
    )
    return operation, Flow("sparse", operation.width, dtype, whole=True, bounded=True)


def _weights(transformer: Any) -> Tfidf:
    idf = floats(transformer.idf_) if transformer.use_idf else None
    return Tfidf(bool(transformer.sublinear_tf), idf, transformer.norm)


@transforms("sklearn.feature_extraction.text.TfidfTransformer")
def _tfidf(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    before, flow = checked(flow, sparse=True)
    return then(before, _weights(estimator)), Flow("sparse", flow.width)


@transforms("sklearn.feature_extraction._dict_vectorizer.DictVectorizer")
def _fields(estimator: Any, flow: Flow) -> tuple[Op, Flow]:
    if flow.kind != "records":
        raise NotCompilable(f"its DictVectorizer would read {flow.kind}")
    if np.dtype(estimator.dtype) != np.float64:
        raise NotCompilable("its DictVectorizer does not compute in float64")
    vocabulary = {str(name): int(column) for name, column in estimator.vocabulary_.items()}
    operation = Fields(vocabulary, len(vocabulary), estimator.separator, bool(estimator.sparse))
    return operation, Flow("sparse" if operation.sparse else "matrix", operation.width)
