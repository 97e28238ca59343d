"""The explorer as one page on disk, which opens without a network."""

import gzip
import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs

from flowhelpers.core.features import FeatureId
from flowhelpers.core.files import DATA
from flowhelpers.explorer_index import FlowIndex

LARGEST = 15_000_000  # bytes of a page
FILES = DATA / "explorer"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:; connect-src data: blob:; base-uri 'none'">
<style>:root {{ color-scheme: light dark }} body {{ margin: 0 auto; max-width: 90rem }}
{css}</style></head><body>
<main id="explorer"><p>The explorer opens. If this stays: this page needs JavaScript,
which is switched off or too old here. It asks nothing of the network.</p></main>
<script>{plotly}</script>
<script type="text/plain" id="records">{records}</script>
<script type="module">{js}
openPage(document.getElementById("explorer"), document.getElementById("records").textContent);
</script></body></html>
"""


def explorer_page(index: FlowIndex, records: dict[str, Any], named: Sequence[FeatureId]) -> str:
    """The explorer as a page that holds these records, and starts at the first feature named.

    A ValueError if it would be over 15 MB.
    """
    page = PAGE.format(
        title=escape(f"The flow of {index.about['suite']}"),
        css=(FILES / "explorer.css").read_text("utf-8"),
        js=(FILES / "explorer.js").read_text("utf-8"),
        plotly=get_plotlyjs(),
        records=b64encode(pack(index, records, named)).decode(),
    )
    if (size := len(page.encode())) > LARGEST:
        raise ValueError(
            f"the page would have {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}: name fewer"
            " features"
        )
    return page


def pack(index: FlowIndex, records: dict[str, Any], named: Sequence[FeatureId] = ()) -> bytes:
    """Records with what holds for all of them, as the explorer's JavaScript unpacks them."""
    about = {name: index.about[name] for name in index.about if name not in ("first", "words")}
    about |= {"whole": index.is_small, "seeds": (seeds := [*map(str, named)])}
    about["start"] = seeds[0] if seeds else ""
    text = json.dumps({"about": about, "records": records}, separators=(",", ":"))
    return gzip.compress(text.encode(), 6, mtime=0)
