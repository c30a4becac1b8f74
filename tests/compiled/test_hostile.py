"""Programs that somebody made to do harm: small files that would take much memory or time, or mix what belongs to different callers."""

import io
import json
import struct

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from app.compiled import container
from app.compiled.combined import Constant
from app.compiled.labels import Each, First
from app.compiled.linear import ClassLabels, sparse_product
from app.compiled.neighbours import Neighbours
from app.compiled.op import Malformed
from app.compiled.patterns import is_linear
from app.compiled.program import Program
from app.compiled.text import CountTerms
from app.compiled.trees import Trees
from app.compiled.values import Sparse
from app.errors import LoadFailed, NoRoom, RequestTooLarge
from app.memory import Watched


def stored(head):
    return Program(None, {"predict": head}).write()


def read(body, **options):
    return Program.read(io.BytesIO(body), len(body), **options)


def terms(**changed):
    fields = {
        "analyzer": "word",
        "shortest": 1,
        "longest": 1,
        "lowercase": True,
        "accents": None,
        "pattern": r"(?u)\b\w\w+\b",
        "stop_words": None,
        "vocabulary": {"a": 0},
        "width": 1,
        "binary": False,
    }
    return CountTerms(**(fields | changed))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:\w+\s?)+!",
        r"(a|a)+b",
        r"(\w+)+!",
        r"\w*\w*!",
        r"[a-z]+\b",
        r"(?a:\w+)\b",
        r"(?:\w+,)*\b\w+;",
        r"(?:a|a)+b|good|bad",
        r"(?:aa|a){9,}b",
        r"(?:a?){99}b",
        r"(?:a+)?b",
        r"\w+(?:'\w+)?!",
        r"\w+(?:'\w+){2}",
        r"\w*?x",
        r"(?:a|b+)(?:c|d+)e",
        r"\d{1,99}\.\d{1,99}",
        r"[a-z]+(?=\s)",
        r"(",
        r"\w+!",
        r"(\w)\1",
        r"(?=\w*!)a",
        r"[a-z]+@[a-z]+",
        "a?" * 30 + "a" * 30,
        r"a{200}",
        r"\b\w+\b.*!",
        "a" * 300,
    ],
)
def test_a_token_pattern_that_may_take_for_ever_is_refused(pattern):
    assert not is_linear(pattern)
    with pytest.raises(Malformed, match="may take for ever"):
        read(stored(terms(pattern=pattern)))


def test_a_token_pattern_of_several_groups_is_refused():
    with pytest.raises(Malformed, match="several groups"):
        read(stored(terms(pattern=r"(a)(b)")))


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?u)\b\w\w+\b",
        r"(?u)\b\w+\b",
        r"\w+",
        r"\S+",
        r"[a-zA-Z']+",
        r"[^\s,]+",
        r"\b[^\d\W]{3,}\b",
        r"#\w+|@\w+|\b\w\w+\b|!|\?",
        r"(?u)(\w)\w*",
        r"#(\w+)",
        r".",
        r"\w+\b",
        r"[a-zA-Z]+",
        r"\b\w+\b",
        r"\w+(?:'\w+)?",
        r"\b\w+(?:['-]\w+)*\b",
        r"[A-Za-z][A-Za-z0-9_-]+",
        r"\d{4}-\d{2}-\d{2}",
        r"\d{1,2}/\d{1,2}/\d{2,4}|\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}",
        r"(?:[a-z]+)|(?:[0-9]+)",
        r"(?i)\b[a-z][a-z]+\b",
        r"\w+|\$[\d.]+|\S+",
        r"(?:\w+\s?)+",
        r"(?:ab)+|(?:colou?r|gray){1,2}",
        r"(?:@\w+)?",
        r"[a-z]{2,}?",
    ],
)
def test_usual_token_patterns_are_linear_and_take_a_long_text_of_any_kind(pattern):
    assert is_linear(pattern)
    operation = terms(pattern=pattern)
    for text in (
        "a" * 200_000,
        "a " * 100_000,
        "a" * 200_000 + "!",
        " " * 200_000 + "_",
        "a!" * 100_000,
        "'" * 200_000,
        "a'" * 100_000,
        "a-a'" * 50_000 + "!",
        "ab" * 100_000 + "c",
        "1." * 100_000,
        "1" * 200_000 + "/",
        "a_" * 100_000 + "-",
        "@" * 200_000,
    ):
        operation.run(np.array([text], dtype=object))


@pytest.mark.parametrize(
    ("analyzer", "shortest", "longest"),
    [("word", 1, 3), ("word", 2, 4), ("char", 1, 5), ("char", 2, 3), ("char_wb", 2, 5)],
)
def test_terms_of_a_long_text_are_those_of_scikit_learn(analyzer, shortest, longest):
    text = "the cat sat on the mat with a hat " * 2000
    vectorizer = CountVectorizer(analyzer=analyzer, ngram_range=(shortest, longest)).fit([text[:500]])
    vocabulary = {term: int(column) for term, column in vectorizer.vocabulary_.items()}
    operation = terms(
        analyzer=analyzer, shortest=shortest, longest=longest, vocabulary=vocabulary, width=len(vocabulary)
    )

    found = operation.run(np.array([text, text[:300]], dtype=object)).toarray()

    assert np.array_equal(found, vectorizer.transform([text, text[:300]]).toarray())


def test_a_dimension_that_no_bytes_bear_out_is_refused():
    entries = {
        "__metadata__": {"diskless": "{}"},
        "a": {"dtype": "F64", "shape": [1 << 28, 0], "data_offsets": [0, 0]},
    }
    header = json.dumps(entries).encode()
    body = struct.pack("<Q", len(header)) + header

    with pytest.raises(LoadFailed):
        container.read(io.BytesIO(body), len(body))


def test_a_header_is_not_decoded_where_there_is_no_room_for_what_it_would_become():
    asked = []

    def look(size):
        asked.append(size)
        if size > 10_000_000:
            raise NoRoom("full")

    many = ClassLabels(tuple("ab" for _ in range(100_000)), strings=True)
    with pytest.raises(NoRoom):
        read(stored(many), look=look)
    assert asked == [max(asked)]


def test_memory_is_looked_at_behind_every_operation():
    looks = []
    program = read(stored(Each((First(), First(), First()), stacked=False)), look=looks.append)

    assert len(looks) == 1 + 4
    assert program.methods == ("predict",)


def test_what_is_about_to_be_taken_counts_against_what_is_free(tmp_path):
    watched = Watched(io.BytesIO(b""), "m/1", limit_bytes=1 << 62)
    watched.look(1)

    with pytest.raises(NoRoom):
        Watched(io.BytesIO(b""), "m/1", limit_bytes=1 << 40).look(1 << 41)


def test_labels_that_would_each_take_as_much_as_the_longest_are_refused():
    with pytest.raises(Malformed, match="too long"):
        read(stored(ClassLabels(("a" * 1_000_000, *"b" * 999), strings=True)))


def test_trees_whose_leaves_would_not_fit_side_by_side_are_refused():
    with pytest.raises(Malformed, match="too many columns"):
        Trees(
            estimator="Forest",
            width=1,
            accepts="any",
            nodes=np.arange(5000) << 32,
            thresholds=np.full(5000, np.inf),
            roots=np.arange(5000),
            values=np.zeros((1, 20_000)),
            turns=1,
            divisor=None,
            engine="walk",
            many=None,
            many_from_rows=1,
        ).check()


def test_rows_that_would_become_too_wide_are_refused_and_fewer_are_not():
    wide = Constant(np.zeros(60_000))

    with pytest.raises(RequestTooLarge, match="at most 833 rows"):
        wide.run(np.zeros((10_000, 1)))
    assert wide.run(np.zeros((3, 1))).shape == (3, 60_000)


def test_the_rows_of_a_matrix_are_not_taken_for_the_items_of_a_tuple():
    with pytest.raises(TypeError):
        Each((First(), First()), stacked=False).run(np.arange(4.0).reshape(2, 2))


def test_many_neighbours_in_many_columns_are_compared_in_parts(peak_megabytes):
    points = np.random.default_rng(0).normal(size=(600, 300))
    nearest = Neighbours(points, 400, "euclidean")

    with peak_megabytes() as peak:
        distances, numbers = nearest.run(points)

    assert peak() < 100  # all at once: 570
    assert np.array_equal(numbers[:, 0], np.arange(600))
    assert np.allclose(distances[:, 0], 0)


def test_a_product_with_many_outputs_is_added_up_in_parts(peak_megabytes):
    random = np.random.default_rng(0)
    coefficients = random.normal(size=(500, 40))
    matrix = random.normal(size=(800, 40))
    rows, columns = np.nonzero(matrix)
    value = Sparse(800, 40, rows, columns, matrix[rows, columns])

    with peak_megabytes() as peak:
        scores = sparse_product(value, coefficients)

    assert peak() < 60  # all at once: 250
    assert np.allclose(scores, matrix @ coefficients.T)


@pytest.fixture
def peak_megabytes():
    """What Python and numpy have allocated at most while a block ran."""
    import contextlib
    import tracemalloc

    @contextlib.contextmanager
    def measured():
        tracemalloc.start()
        found = []
        try:
            yield lambda: found[0]
        finally:
            found.append(tracemalloc.get_traced_memory()[1] / 1e6)
            tracemalloc.stop()

    return measured
