"""The examples in docstrings run as they stand, on the suite that comes with the package."""

import doctest

import pytest

from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.steered_texts import steer


@pytest.mark.parametrize("function", [make_plan, steer])
def test_an_example_gives_what_it_says(function: object) -> None:
    (example,) = [t for t in doctest.DocTestFinder().find(function, globs={}) if t.examples]
    assert doctest.DocTestRunner().run(example).failed == 0
