"""What a notebook shows its reader: tables whole, without row numbers."""

import re

import pandas as pd

from flowhelpers import runs


def test_a_table_is_shown_whole_and_without_its_row_numbers():
    long = "word <b>salad</b> " * 20
    table = pd.DataFrame({"text": [long, "b"], "score": [0.123456, None], "n": [3, 4]})
    page = runs.show(table, digits=3, caption="what it says").to_html()
    assert long.strip().replace("<", "&lt;").replace(">", "&gt;") in page
    assert "0.123" in page
    assert "0.1234" not in page
    assert "nan" not in page
    assert "row_heading" not in page
    assert "what it says" in page
    cells = pd.DataFrame({"layer": [1.0, None], "strength": [-64.0, 0.5], "score": [1.0, 2]})
    shown = re.findall(r"<td[^>]*>([^<]*)</td>", runs.show(cells, digits=3).to_html())
    assert shown == ["1", "-64", "1.000", "", "0.5", "2.000"]
    near_0 = pd.DataFrame({"layer": [-0.0], "score": [-0.001], "any": [-0.001]}).astype(
        {"any": object}
    )
    shown = re.findall(r"<td[^>]*>([^<]*)</td>", runs.show(near_0).to_html())
    assert shown == ["0", "0.00", "0.00"]
    named = runs.show(table.set_index("n")).to_html()
    twice = pd.concat([table, table])  # whose row numbers are not unique
    assert runs.show(twice).to_html().count("<tr>") == 2 * len(table) + 1
    assert re.search(r'row_heading level0 row0"\s*>3<', named)
    assert "<caption>" not in named


def test_what_an_interval_says_of_a_difference():
    row = pd.Series({"difference": 0.25, "difference_low": 0.1, "difference_high": 0.4})
    assert runs.spread(row) == "+0.25 (+0.10 to +0.40)"
    (named,) = pd.DataFrame([row.add_prefix("my_")]).itertuples()
    assert runs.spread(named, ".0%", "my_difference") == "+25 points (+10 to +40)"
    assert runs.spread((0.25, 0.1, 0.4), ".0%", sign="-") == "25% (10% to 40%)"
    assert runs.spread((0.1234, -0.05, 0.2), sign="-") == "0.12 (-0.05 to 0.20)"
    assert runs.spread([-0.0004, -0.05, 0.2], ".3f", sign="-") == "0.000 (-0.050 to 0.200)"
    assert runs.spread((-0.001, -0.05, 0.05)) == "+0.00 (-0.05 to +0.05)"
    assert runs.spread([float("nan")] * 3) == "+nan"
    told = [runs.verdict_of(*ends) for ends in ((0.1, 0.4), (-0.4, -0.1), (-0.1, 0.1))]
    assert told == ["holds here", "not seen here", "cannot be told here"]
    assert runs.verdict_of(float("nan"), float("nan")) == "cannot be told here"


def test_a_conclusion_is_sentences_and_is_kept(tmp_path):
    run = runs.Run(tmp_path)
    seen = runs.Finding("A claim.", "Ours.", "Chance.", "not seen here")
    unasked = runs.Finding("Another.", "Why not.", "", "not asked here")
    text = str(runs.conclude(run, [seen, unasked]).data)
    assert "**A claim.**\n\nOurs. Chance. *This is not seen here.*" in text
    assert "*This was not asked here.* Why not." in text
    assert [each["verdict"] for each in run.results({})["findings"]] == [
        "not seen here",
        "not asked here",
    ]


def test_where_a_number_is_missing_no_verdict_is_given(tmp_path):
    nan = float("nan")
    empty = runs.Finding("A claim.", f"{nan:.0%} of 0.", f"It is {nan:+.1f}.", "not seen here")
    text = str(runs.conclude(runs.Run(tmp_path), [empty]).data)
    assert "too few of 0. It is too few. *This cannot be told here.*" in text
    assert "nan" not in str(runs.answer(f"{nan:.1%} of them, in Nancy").data).replace("Nancy", "")
