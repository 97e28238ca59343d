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
    named = runs.show(table.set_index("n")).to_html()
    assert re.search(r'row_heading level0 row0"\s*>3<', named)
    assert "<caption>" not in named
