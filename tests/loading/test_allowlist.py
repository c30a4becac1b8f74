"""The list of names is what it says: short, sorted into kinds, and skops' where it says so."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from skops.io import _trusted_types as skops_types

from app.loading import allowlist
from app.loading.allowlist import FROM_SKOPS, KINDS, LIST
from app.loading.reconstruction import CALLS, FINISH
from tests.service import ROOT

# What skops trusts and this list does not: pickle has operations of its own for the collections, and nothing in
# scikit-learn makes the others. `builtins.map` is a generator over a function of somebody's choice.
LEFT_OUT = {f"builtins.{name}" for name in ("list", "set", "tuple", "dict", "map")} | {
    f"numpy.random._{name.lower()}.{name}" for name in ("MT19937", "PCG64", "Philox", "SFC64")
}


def test_what_is_said_to_be_from_skops_is():
    theirs = {
        name
        for group in vars(skops_types).values()
        if isinstance(group, (list, set, tuple, frozenset))
        for name in group
        if isinstance(name, str)
    }

    assert FROM_SKOPS - theirs == set()


def test_every_call_has_what_stands_for_it_and_no_other_name_has():
    assert {name for name, kind in KINDS.items() if kind == "calls"} == CALLS.keys()
    assert all(KINDS[name] == "instances" for name in FINISH)


@pytest.mark.parametrize("kind", ["instances", "values"])
def test_every_name_that_is_used_as_it_is_is_here(kind):
    import sklearn.experimental.enable_halving_search_cv
    import sklearn.experimental.enable_iterative_imputer  # noqa: F401 - nothing else lets their modules be imported

    for name in (name for name, of in KINDS.items() if of == kind):
        value = allowlist.resolve(name)

        assert isinstance(value, type) or (kind == "values" and callable(value)), name
        assert not inspect.ismodule(value), name


def test_what_is_made_empty_runs_nothing_of_its_own_when_it_is_made():
    """`__new__` is object's, or one in C; the deprecated ones warn in it."""
    own = {
        name.rpartition(".")[2]
        for name in (name for name, kind in KINDS.items() if kind == "instances")
        if inspect.isfunction(allowlist.resolve(name).__new__)
    }

    assert own == {"PassiveAggressiveClassifier", "PassiveAggressiveRegressor"}


def test_the_state_of_what_is_made_empty_is_set_by_few():
    """Each of these has been read. A new one, in a new scikit-learn, wants to be."""
    found = Counter(
        f"{base.__module__}.{base.__qualname__}"
        for name in (name for name, kind in KINDS.items() if kind == "instances")
        for base in [next((base for base in allowlist.resolve(name).__mro__ if "__setstate__" in vars(base)), object)]
    )
    del found["builtins.object"]

    assert found.keys() == {
        "scipy.interpolate._bsplines.BSpline",  # rebuilds the two parts that it has
        "sklearn.base.BaseEstimator",  # compares a version, and updates `__dict__`
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",  # converts the order of bytes
        "sklearn.isotonic.IsotonicRegression",  # builds its interpolation anew
        "sklearn.metrics._dist_metrics.DistanceMetric64",
        "sklearn.metrics._dist_metrics.MahalanobisDistance64",
        "sklearn.neighbors._ball_tree.BinaryTree64",
        "sklearn.neighbors._kd_tree.BinaryTree64",
        "sklearn.utils._bunch.Bunch",  # does nothing
    }


def test_no_name_leads_to_what_runs_or_opens():
    """The names of the list that are in modules with such functions, and all in front of which one would hesitate."""
    banned = ("os.", "posix.", "subprocess.", "importlib.", "pickle.", "numpy.testing.", "numpy.f2py.", "numpy.lib.")

    assert not [name for name in KINDS if name.startswith(banned)]
    assert {name for name in KINDS if name.startswith(("builtins.", "functools.", "copyreg.", "_codecs."))} == {
        *(
            "_codecs.encode",
            "builtins.bool",
            "builtins.bytes",
            "builtins.float",
            "builtins.frozenset",
            "builtins.getattr",
        ),
        *("builtins.int", "builtins.object", "builtins.range", "builtins.set", "builtins.slice", "builtins.str"),
        *("copyreg._reconstructor", "functools.partial"),
    }


def test_functions_of_the_list_are_numpys_ufuncs_or_named_one_by_one():
    functions = [name for name, kind in KINDS.items() if kind == "values"]
    others = [name for name in functions if not isinstance(allowlist.resolve(name), (np.ufunc, type))]

    assert len(others) < 150
    assert {name.split(".")[0] for name in others} == {"numpy", "sklearn"}


def test_a_name_is_found_where_another_version_had_it():
    for module, name, full in [
        ("numpy.core.multiarray", "_reconstruct", "numpy._core.multiarray._reconstruct"),
        ("__builtin__", "set", "builtins.set"),
        ("__builtin__", "xrange", "builtins.range"),
        ("copy_reg", "_reconstructor", "copyreg._reconstructor"),
        ("numpy.core", "multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        ("sklearn.linear_model._ridge", "Ridge.fit", None),
        ("", "sklearn.linear_model._ridge.Ridge", None),
    ]:
        assert allowlist.listed(module, name) == full


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [
        ("_loss", "CyHalfBinomialLoss", ModuleNotFoundError),
        ("sklearn.ensemble._gb_losses", "Huber", ModuleNotFoundError),
        ("sklearn.metrics._dist_metrics", "EuclideanDistance", AttributeError),
        ("pandas.core.indexes.numeric", "Int64Index", ModuleNotFoundError),
        ("__main__", "Clip", AttributeError),
    ],
)
def test_what_this_version_does_not_have_is_missing_rather_than_untrusted(module, name, kind):
    assert type(allowlist.missing(module, name)) is kind


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("my.features", "Clip"),
        ("os", "system"),
        ("numpy.testing", "runstring"),
        ("sklearn.base", "os.system"),
        ("sklearn..", "x"),
    ],
)
def test_what_may_be_here_is_a_question_of_trust_and_not_imported(module, name):
    assert allowlist.missing(module, name) is None


def test_reading_the_list_imports_nothing_that_it_names():
    code = "import sys; import app.loading.allowlist; print([m for m in sys.modules if m in ('sklearn', 'numpy', 'skops')])"

    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_the_list_says_of_each_part_why_it_may_be_there():
    """Every section begins with a comment."""
    lines = LIST.read_text("utf-8").splitlines()

    for number, line in enumerate(lines):
        if line.startswith("["):
            assert lines[number + 1].startswith("#"), line
