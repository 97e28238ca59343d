"""The examples in the docstrings of what everyone needs first give what they say."""

import doctest

import pytest

import flowhelpers

FIRST = ["load_suite", "match_table", "flow_graph", "collect", "make_plan", "steer"]


@pytest.mark.parametrize("name", FIRST)
def test_the_example_gives_what_it_says(name: str):
    function = getattr(flowhelpers, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(
        getattr(function, "__wrapped__", function), name, globs={}
    )
    assert example.examples
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert results.failed == 0
