import io

import numpy as np
import pytest

from app.compiled import container, op
from app.compiled.anomaly import Inliers, PathLengths
from app.compiled.labels import Each, Labels, Link, Margin, Mirrored, Parts, WeightedMedian
from app.compiled.op import Malformed

SCORES = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])


def stored(operation):
    arrays = {}
    document = op.encode(operation, arrays)
    body = container.write(document, arrays)
    return op.decode(*container.read(io.BytesIO(body), len(body)))


@pytest.mark.parametrize(
    ("classes", "kind"),
    [
        (("a", "ü", ""), object),
        (np.array([3, 1, 2]), np.int64),
        (np.array([1.5, -2.0, 0.0]), np.float64),
        (np.array([1, 2, 3], np.uint8), np.uint8),
    ],
)
def test_the_first_of_the_greatest_scores_names_the_class(classes, kind):
    found = stored(Labels(classes, "greatest")).run(SCORES)

    assert found.dtype == kind
    assert found.tolist() == [list(classes)[place] for place in (1, 0, 2)]


@pytest.mark.parametrize(
    ("rule", "second"), [("positive", [False, False, True]), ("not_negative", [False, True, True])]
)
def test_the_sign_of_the_only_score_names_one_of_two_classes(rule, second):
    scores = np.array([-0.1, 0.0, 0.1])
    labels = stored(Labels(np.array([False, True]), rule))

    assert labels.run(scores).tolist() == second
    assert labels.run(scores[:, None]).tolist() == second


@pytest.mark.parametrize(
    "operation",
    [
        Labels((), "greatest"),
        Labels(np.array([]), "greatest"),
        Labels(np.array([[1, 2]]), "greatest"),
        Labels(("a", "b", "c"), "positive"),
        Labels(("a",), "not_negative"),
        Labels(("a", "b"), "least"),
        Parts(()),
        Parts((2, 0)),
        Each((), stacked=False),
        Link("softmax", 0.0),
        Link("cosine", 1.0),
        Link("logistic", float("nan")),
        WeightedMedian(np.array([])),
        WeightedMedian(np.array([1, 2])),
        PathLengths(0.0),
        PathLengths(float("inf")),
    ],
)
def test_what_cannot_be_computed_is_refused_as_it_is_read(operation):
    with pytest.raises(Malformed):
        stored(operation)


def test_fewer_classes_than_scores_are_an_error_and_not_another_class():
    with pytest.raises(IndexError):
        Labels(("a", "b"), "greatest").run(SCORES)


def test_the_logistic_function_has_its_limits_where_numbers_end():
    scores = np.array([-1000.0, -709.5, 0.0, 36.0, 1000.0, np.inf, -np.inf, np.nan])
    with np.errstate(over="ignore"):
        found = Link("logistic", 1.0).run(scores)

    assert found[[0, 2, 4, 5, 6]].tolist() == [0.0, 0.5, 1.0, 1.0, 0.0]
    assert 0 < found[1] < 1e-300
    assert np.isnan(found[7])


def test_margins_are_mirrored_and_parts_are_columns():
    assert Mirrored().run(Margin().run(SCORES[:, :2])).tolist() == [[-0.3, 0.3], [0.0, 0.0], [-0.1, 0.1]]
    assert [part.tolist() for part in Parts((1, 2)).run(SCORES[:1])] == [[[0.2]], [[0.5, 0.3]]]


def test_rows_above_the_offset_are_inliers():
    scores = np.array([-0.6, -0.5, -0.4])

    assert Inliers(-0.5, decided=True).run(scores).tolist() == [-1, 1, 1]
    assert Inliers(-0.5, decided=False).run(scores).tolist() == (scores + 0.5).tolist()
