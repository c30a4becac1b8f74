"""The gate on recorded versions, and what is said of the failures that foreign versions lead to."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn

from app.errors import LoadFailed, VersionMismatch
from app.versions import check, differences, explain, present_versions

FOREIGN = Path(__file__).parent / "data" / "foreign"
HERE = {
    "python": "3.12.1",
    "scikit-learn": "1.9.1",
    "numpy": "2.5.5",
    "scipy": "1.18.1",
    "joblib": "1.6.0",
    "pandas": "3.1.1",
}
SKLEARN = sklearn.__version__


def test_the_versions_here_are_those_that_the_libraries_give_themselves():
    found = present_versions()

    assert found["scikit-learn"] == sklearn.__version__
    assert found["numpy"] == np.__version__
    assert found["pandas"] == pd.__version__
    assert set(found) == set(HERE)


def test_what_differs_here_is_told_of_python_and_the_known_libraries_only():
    recorded = present_versions() | {"numpy": "1.0", "": "1", "boto3": "?", "pip": "1"}

    assert differences(recorded) == {"numpy": {"trained_with": "1.0", "present": np.__version__}}


def test_of_a_version_that_is_none_only_the_beginning_is_told():
    endless = {"scikit-learn": "1.0" + "x" * 2_000_000, "scipy": "y" * 2_000_000}
    with pytest.raises(VersionMismatch) as caught:
        check(endless, "churn/7", present=HERE)
    warned = check(endless, "churn/7", present=HERE, policy="warn")
    blamed = explain(ValueError("Incompatible checksums (0x1 vs 0x2"), endless, present=HERE)

    assert max(map(len, (str(caught.value), blamed, *warned))) < 500


def test_the_same_versions_are_not_worth_a_word():
    assert check(HERE, "churn/7", present=HERE) == ()
    assert check(present_versions(), "churn/7") == ()


@pytest.mark.parametrize("trained_with", [{}, {"xgboost": "2.0"}])
def test_what_was_not_recorded_is_not_compared(trained_with):
    assert check(trained_with, "churn/7", present=HERE) == ()


@pytest.mark.parametrize(
    ("library", "version"),
    [
        ("scikit-learn", "1.5.2"),
        ("scikit-learn", "1.10.0"),
        ("scikit-learn", "2.9.1"),
        ("scikit-learn", "1.19.1"),
        ("scikit-learn", "0.24.2"),
        ("numpy", "1.26.4"),
        ("numpy", "2.4.5"),
        ("numpy", "3.0.0"),
        ("numpy", "unknown"),
        ("numpy", ""),
    ],
)
def test_another_minor_version_is_refused_with_both_versions_and_what_to_do(library, version):
    with pytest.raises(VersionMismatch) as caught:
        check(HERE | {library: version}, "churn/7", present=HERE)

    assert str(caught.value) == (
        f"churn/7: was trained with {library} {version}, here is {library} {HERE[library]}: train it with {library} "
        f"{HERE[library]} and publish it again, or put {library}=={version} into ml-requirements.txt "
        "(ML_VERSION_POLICY=warn would load it all the same)"
    )


def test_a_model_of_two_other_libraries_hears_of_both_at_once():
    with pytest.raises(VersionMismatch, match="trained with scikit-learn 1.5.2 and numpy 1.26.4, here is") as caught:
        check({"numpy": "1.26.4", "scikit-learn": "1.5.2"}, "churn/7", present=HERE)

    assert "put scikit-learn==1.5.2 and numpy==1.26.4 into ml-requirements.txt" in str(caught.value)


def test_a_library_that_is_not_here_is_said_to_be_none():
    here = {"python": "3.12.1", "numpy": "2.5.5"}

    with pytest.raises(VersionMismatch, match="here is scikit-learn none"):
        check(HERE, "churn/7", present=here)


def test_with_the_policy_warn_the_same_is_only_told():
    found = check(HERE | {"scikit-learn": "1.5.2"}, "churn/7", present=HERE, policy="warn")

    assert found == (
        "was trained with scikit-learn 1.5.2, here is scikit-learn 1.9.1: its answers may be wrong; train it with "
        "scikit-learn 1.9.1 and publish it again",
    )


@pytest.mark.parametrize(
    ("library", "version"),
    [
        ("scikit-learn", "1.9.0"),
        ("scikit-learn", "1.9.2rc1"),
        ("scikit-learn", "1.9"),
        ("numpy", "2.5.0"),
        ("python", "3.11.7"),
        ("scipy", "1.14.1"),
        ("joblib", "1.4.2"),
        ("pandas", "2.2.3"),
    ],
)
def test_a_patch_and_the_other_libraries_are_only_told(library, version):
    for policy in ("refuse", "warn"):
        found = check(HERE | {library: version}, "churn/7", present=HERE, policy=policy)

        assert found == (f"was trained with {library} {version}, here {HERE[library]}",)


def test_all_that_is_only_told_is_one_sentence():
    found = check(HERE | {"pandas": "2.2.3", "joblib": "1.4.2"}, "churn/7", present=HERE)

    assert found == ("was trained with joblib 1.4.2, here 1.6.0; pandas 2.2.3, here 3.1.1",)


def load(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return joblib.load(FOREIGN / name)


def failure_of(name: str) -> Exception:
    """Return what loading one of the foreign files raises, or what predicting with it does."""
    try:
        model = load(name)
        rows: Any = np.random.RandomState(0).normal(size=(3, 3))
        if "columns" in name:
            rows = pd.DataFrame(rows, columns=list("abc")).assign(d=["u", "v", "w"])
        model.predict(rows)
    except Exception as error:
        return error
    raise AssertionError(f"{name} works")


@pytest.mark.parametrize(
    ("name", "wording", "meaning"),
    [
        ("sklearn-0.24.2-gradient-boosting", "No module named 'sklearn.ensemble._gb_losses'", "there is no module"),
        ("sklearn-1.4.2-gradient-boosting", "Can't get attribute '__pyx_unpickle_CyHalf", "there is no __pyx_unpickle"),
        ("sklearn-1.5.2-gradient-boosting", "No module named '_loss'", "its losses are in a module"),
        ("sklearn-1.5.2-hist-gradient-boosting", "No module named '_loss'", "its losses are in a module"),
        ("sklearn-1.0.2-tree", "node array from the pickle has an incompatible dtype", "nodes of its trees"),
        ("sklearn-1.0.2-neighbours", "Can't get attribute 'EuclideanDistance'", "there is no EuclideanDistance in"),
        ("sklearn-1.5.2-columns", "Can't get attribute '_RemainderColsList'", "there is no _RemainderColsList in"),
        ("sklearn-1.0.2-columns", "'OneHotEncoder' object has no attribute", "a OneHotEncoder of"),
        ("sklearn-1.5.2-imputer", "'SimpleImputer' object has no attribute", "a SimpleImputer of"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_the_failures_of_real_foreign_models_are_explained(name, wording, meaning, recorded):
    version = name.split("-")[1]
    error = failure_of(f"{name}.joblib")
    found = explain(error, {"scikit-learn": version} if recorded else {})

    assert wording in str(error)
    assert meaning in found
    assert found.endswith(
        f"; train it with scikit-learn {SKLEARN} and publish it again, or put scikit-learn=={version} into ml-requirements.txt"
        if recorded
        else f"; train it with scikit-learn {SKLEARN} and publish it again"
    )
    assert found.startswith(
        f"scikit-learn {version} wrote it and {SKLEARN} reads it here: "
        if recorded
        else f"another version of scikit-learn than {SKLEARN} wrote it: "
    )


def test_a_frame_of_an_older_pandas_is_explained():
    error = failure_of("pandas-1.3.5-frame.joblib")

    assert explain(error, {"pandas": "1.3.5"}).startswith(
        f"pandas 1.3.5 wrote it and {pd.__version__} reads it here: it holds a DataFrame"
    )


@pytest.mark.parametrize("name", ["sklearn-1.5.2-forest", "sklearn-1.5.2-numpy-2.0.2-forest"])
def test_a_foreign_model_that_works_by_luck_is_the_gates_affair(name):
    assert load(f"{name}.joblib").predict(np.zeros((2, 3))).shape == (2,)
    with pytest.raises(VersionMismatch):
        check({"scikit-learn": "1.5.2"}, "churn/7")


def unpickling(body: bytes) -> Exception:
    try:
        pickle.loads(body)
    except Exception as error:
        return error
    raise AssertionError("it was read")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            b"c__main__\nMyScaler\n.",
            "MyScaler was defined in the notebook or script that trained it, which is not here: define it in a module, "
            "import it from there, train and publish again, and deploy the module with the service",
        ),
        (
            b"cxgboost.sklearn\nXGBClassifier\n.",
            "it needs the module xgboost, which is not installed here: put xgboost, in the version it was trained with, "
            "into ml-requirements.txt, or, if it is code of your own, deploy it with the service",
        ),
        (
            b"cimblearn.pipeline\nPipeline\n.",
            "it needs the module imblearn, which is not installed here: put imbalanced-learn, in the version it was trained "
            "with, into ml-requirements.txt, or, if it is code of your own, deploy it with the service",
        ),
        (
            b"cfeatures\nClean\n.",
            "it needs the module features, which is not installed here: put features, in the version it was trained with, "
            "into ml-requirements.txt, or, if it is code of your own, deploy it with the service",
        ),
        (
            b"corjson.removed\nThing\n.",
            "the orjson that is installed here has no module orjson.removed: put the version it was trained with into "
            "ml-requirements.txt",
        ),
        (
            b"corjson\nThing\n.",
            "the orjson that is here has no Thing: deploy the version of it that the model was trained with, or train it "
            "with this one and publish it again",
        ),
        (
            b"csklearn.externals.joblib.numpy_pickle\nNumpyArrayWrapper\n.",
            "scikit-learn before 0.23 wrote it and 1.9.1 reads it here: it holds a copy of joblib that scikit-learn has had "
            "until then; train it with scikit-learn 1.9.1 and publish it again",
        ),
        (
            b"csklearn.neighbors.classification\nKNeighborsClassifier\n.",
            "another version of scikit-learn than 1.9.1 wrote it: there is no module sklearn.neighbors.classification in "
            "1.9.1; train it with scikit-learn 1.9.1 and publish it again",
        ),
        (
            b"cpandas.core.indexes.numeric\nInt64Index\n.",
            "another version of pandas than 3.1.1 wrote it: there is no module pandas.core.indexes.numeric in 3.1.1; train "
            "it with pandas 3.1.1 and publish it again",
        ),
        (
            b"cpandas.core.internals.blocks\nold_block\n.",
            "another version of pandas than 3.1.1 wrote it: there is no old_block in the pandas.core.internals.blocks of "
            "3.1.1; train it with pandas 3.1.1 and publish it again",
        ),
        (
            b"\x80\x09.",
            "another version of Python than 3.12.1 wrote it: it is pickled in a way that is newer than this Python; train "
            "it with Python 3.12.1 and publish it again",
        ),
    ],
)
def test_what_unpickling_raises_here_is_explained(body, sentence):
    assert explain(unpickling(body), {}, present=HERE) == sentence


# What is raised elsewhere, as it was seen there: the versions are those of the service.
@pytest.mark.parametrize(
    ("error", "trained_with", "present", "sentence"),
    [
        (  # numpy 1.24.4 reads what 2.5.5 wrote
            ModuleNotFoundError("No module named 'numpy._core'", name="numpy._core"),
            {},
            {"numpy": "1.24.4"},
            "numpy 2 or later wrote it and 1.24.4 reads it here: numpy 2 has moved what its arrays are made of; train it "
            "with numpy 1.24.4 and publish it again",
        ),
        (
            ModuleNotFoundError("No module named 'numpy._core'", name="numpy._core"),
            {"numpy": "2.5.5"},
            {"numpy": "1.24.4"},
            "numpy 2.5.5 wrote it and 1.24.4 reads it here: numpy 2 has moved what its arrays are made of; train it with "
            "numpy 1.24.4 and publish it again, or put numpy==2.5.5 into ml-requirements.txt",
        ),
        (
            ModuleNotFoundError("No module named 'numpy.core.multiarray'", name="numpy.core.multiarray"),
            {"numpy": "1.26.4"},
            {"numpy": "3.0.0"},
            "numpy 1.26.4 wrote it and 3.0.0 reads it here: there is no module numpy.core.multiarray in 3.0.0; train it "
            "with numpy 3.0.0 and publish it again, or put numpy==1.26.4 into ml-requirements.txt",
        ),
        (  # numpy 1.26.4 reads what 2.5.5 wrote
            ValueError("<class 'numpy.random._mt19937.MT19937'> is not a known BitGenerator module."),
            {"numpy": "2.5.5"},
            {"numpy": "1.26.4"},
            "numpy 2.5.5 wrote it and 1.26.4 reads it here: its random state is written in another way; train it with numpy "
            "1.26.4 and publish it again, or put numpy==2.5.5 into ml-requirements.txt",
        ),
        (  # scikit-learn 0.24.2 reads what 1.9.1 wrote
            ValueError("Did not recognise loaded array dytpe"),
            {"scikit-learn": "1.9.1"},
            {"scikit-learn": "0.24.2"},
            "scikit-learn 1.9.1 wrote it and 0.24.2 reads it here: the nodes of its trees are laid out in another way; train "
            "it with scikit-learn 0.24.2 and publish it again, or put scikit-learn==1.9.1 into ml-requirements.txt",
        ),
        (  # pandas 2.2.3 reads what 3.1.1 wrote
            TypeError("StringDtype.__init__() takes from 1 to 2 positional arguments but 3 were given"),
            {"pandas": "3.1.1"},
            {"pandas": "2.2.3"},
            "pandas 3.1.1 wrote it and 2.2.3 reads it here: it holds a DataFrame, a Series or an Index, and their inside has "
            "changed; train it with pandas 2.2.3 and publish it again, or put pandas==3.1.1 into ml-requirements.txt",
        ),
        (  # pandas-dev/pandas#43543
            AttributeError(
                "Can't get attribute 'new_block' on <module 'pandas.core.internals.blocks' from '/usr/blocks.py'>"
            ),
            {},
            {"pandas": "1.1.5"},
            "another version of pandas than 1.1.5 wrote it: there is no new_block in the pandas.core.internals.blocks of "
            "1.1.5; train it with pandas 1.1.5 and publish it again",
        ),
        (  # Python 3.12 reads what cloudpickle made of a function in 3.10
            TypeError("code() argument 13 must be str, not int"),
            {"python": "3.10.13"},
            {"python": "3.12.1"},
            "Python 3.10.13 wrote it and 3.12.1 reads it here: it holds the byte code of a function, which belongs to one "
            "version of Python; train it with Python 3.12.1 and publish it again, or serve it with Python 3.10",
        ),
        (
            ValueError(
                "numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header, got 88 from PyObject"
            ),
            {},
            {"numpy": "1.26.4"},
            "a library that is installed here was built for another numpy than 1.26.4: install what ml-requirements.txt "
            "pins, all of it, into a new environment",
        ),
        (
            ModuleNotFoundError("No module named 'pandas'", name="pandas"),
            {"pandas": "3.1.1"},
            {"numpy": "2.5.5"},
            "it needs the module pandas, which is not installed here: put pandas, in the version it was trained with, into "
            "ml-requirements.txt, or, if it is code of your own, deploy it with the service",
        ),
        (
            AttributeError("module '__main__' has no attribute 'add_features'"),
            {},
            {},
            "add_features was defined in the notebook or script that trained it, which is not here: define it in a module, "
            "import it from there, train and publish again, and deploy the module with the service",
        ),
        (
            AttributeError("Can't get attribute 'tokens' on <module '__mp_main__' from '/app/__main__.py'>"),
            {},
            {},
            "tokens was defined in the notebook or script that trained it, which is not here: define it in a module, "
            "import it from there, train and publish again, and deploy the module with the service",
        ),
    ],
)
def test_what_other_versions_raise_is_explained(error, trained_with, present, sentence):
    assert explain(error, trained_with, present=present) == sentence


def test_the_cause_of_an_error_is_explained_too():
    error = LoadFailed("churn/7 model.joblib: cannot be read as joblib")
    error.__cause__ = unpickling(b"c__main__\nMyScaler\n.")

    assert explain(error, {}).startswith("MyScaler was defined in the notebook")


def test_a_circle_of_causes_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first

    assert explain(first, {}) == ""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("X has 3 features, but LogisticRegression is expecting 4 features as input"),
        EOFError("Ran out of input"),
        AttributeError("'list' object has no attribute 'shape'"),
        KeyError("sepal_length"),
        pickle.UnpicklingError("invalid load key, 'x'."),
        ModuleNotFoundError("nobody knows what"),
        MemoryError(),
    ],
)
def test_other_errors_are_not_explained_away(error):
    assert explain(error, {"scikit-learn": "1.5.2"}, present=HERE) == ""


def test_an_attribute_that_is_missing_is_not_laid_to_a_version_that_is_the_same():
    error = failure_of("sklearn-1.5.2-imputer.joblib")

    assert explain(error, present_versions()) == ""


def test_an_attribute_that_a_class_of_somebody_elses_lacks_is_not_explained():
    class Own:
        pass

    with pytest.raises(AttributeError) as caught:
        Own().missing  # noqa: B018 - raises

    assert explain(caught.value, {"scikit-learn": "1.5.2"}) == ""


def test_an_error_of_a_version_that_was_recorded_as_the_same_is_still_one_of_another():
    error = failure_of("sklearn-1.5.2-gradient-boosting.joblib")

    assert explain(error, present_versions()).startswith(f"another version of scikit-learn than {SKLEARN} wrote it")


def test_what_a_damaged_pickle_raises_never_makes_the_explanation_fail():
    generator = np.random.default_rng(0)
    body = pickle.dumps({"model": np.float64, "rows": [1, "a", None]})
    errors: list[Exception] = []
    for _ in range(500):
        changed = bytearray(body)
        changed[generator.integers(len(body))] = generator.integers(256)
        try:
            pickle.Unpickler(io.BytesIO(changed)).load()
        except Exception as error:
            errors.append(error)

    assert len(errors) > 50
    assert all(isinstance(explain(error, {}), str) for error in errors)
