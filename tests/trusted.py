"""The classes and functions that models of the tests are made of, trusted by name as an operator would."""

import inspect

from app.trust import Trust
from tests import estimators, toys, zoo

TRUST = Trust(
    types=frozenset(
        f"{module.__name__}.{name}"
        for module in (estimators, toys, zoo)
        for name, value in vars(module).items()
        if inspect.getmodule(value) is module and not name.startswith("_")
    )
    | {"tests.test_publishing.halve_whole_numbers"}
)
