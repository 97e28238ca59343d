"""How long the explorer takes at a suite's size: to open its file, and from a click to the graph.

    python tests/benchmarks/explorer_speed.py [--layers 26] [--features 16384] [--clicks 200]

Matches are random numbers of the shape of Gemma 2 2B's: 78 sites, five matches each way, so 1.3
million features and 12.6 million matches (2 million of them best in the stream alone). The file is
written, opened anew, and clicked through; with a chromium, so is a page of a few neighbourhoods.

Two cores of an Intel Xeon, nothing else running, the default shape:

| | least | median | most |
| --- | --- | --- | --- |
| the file of 121 MB opens | | 0.003 s | |
| from a click to the kernel's answer | 2 ms | 3 ms | 141 ms |
| a search in 1.3 million labels | 91 ms | 99 ms | 102 ms |
| the page of 20 neighbourhoods opens | | 1.5 s | |
| from a click in the page to card and graph | 52 ms | 59 ms | 84 ms |

Of the last, plotly's drawing is nearly all. The page of `flowlet`, 9.0 MB, opened in
2.5 to 4.4 s where the cores were busy, with 42 ms (least) and 57 ms (median) a click.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from clock import options, seconds

sys.path.insert(0, str(Path(__file__).parents[1]))
from browsers import CHROMIUM, open_browser

from flowhelpers.core.cache import read_arrays, write_arrays
from flowhelpers.core.features import MODULES, FeatureId, Site
from flowhelpers.explorer_index import RANKS, FlowIndex
from flowhelpers.explorer_page import explorer_page


def random_index(layers: int, features: int) -> FlowIndex:
    """What `index_matches` gives, of random numbers."""
    rng = np.random.default_rng(0)
    sites = sorted(Site(layer, module) for layer in range(layers) for module in MODULES)
    pairs = [(at, m) for at in range(layers) for m in MODULES if at or m != "res"]
    keys = [f"{way} {at} {m}" for way in ("backward", "forward") for at, m in pairs]
    each = features * RANKS
    blocks = {k: {"start": i * each, "ranks": RANKS, "null": 0.1} for i, k in enumerate(keys)}
    n, m = len(sites) * features, len(keys) * each
    arrays = {
        "other": rng.integers(0, features, m, np.int32),
        "score": -np.sort(-rng.random((m // RANKS, RANKS), np.float32), axis=1).reshape(-1),
        "mutual": rng.integers(0, 2, m, np.uint8),
        "class": rng.integers(0, 4, n, np.int8),
        "born": rng.integers(0, 3, n, np.int8),
        "first": rng.integers(0, layers // 2, n, np.int16),
        "last": rng.integers(layers // 2, layers, n, np.int16),
    }
    ranged = [*range(layers)]
    about = {"suite": "random", "layers": ranged, "blocks": blocks, "subjects": {}, "read": {}}
    about |= {"sites": {str(site): features for site in sites}}
    about |= {"first": {str(site): i * features for i, site in enumerate(sites)}}
    about |= {
        "chance": dict.fromkeys(map(str, ranged), 0.1),
        "links": dict.fromkeys(map(str, sites), ""),
    }
    about |= {"overview": {"class": {"translated": [features] * layers}, "born": {}, "life": {}}}
    return FlowIndex(about, arrays)


def in_a_browser(index: FlowIndex, folder: Path, clicks: list[FeatureId]) -> None:
    """The same from the page: until it stands, and from a click until the graph is drawn anew."""
    page_text = explorer_page(index, index.neighbourhood(clicks[:20]), clicks[:20])
    (folder / "page.html").write_text(page_text, encoding="utf-8")
    print(f"page of 20 neighbourhoods: {(folder / 'page.html').stat().st_size / 1e6:.1f} MB")
    with open_browser(folder) as browser:
        page = browser.new(viewport={"width": 1300, "height": 900})

        def opened() -> None:
            page.goto((folder / "page.html").as_uri())
            page.wait_for_selector(".fx-card h2")

        print(f"page opens in {seconds(opened)[0]:.2f} s")
        go = """(name) => new Promise((done) => { const began = performance.now(), find = document
        .querySelector(".fx form"); find.querySelector("input").value = name; find.requestSubmit();
        const card = () => document.querySelector(".fx-card h2").textContent.endsWith(name) ?
        done(performance.now() - began) : setTimeout(card, 1); card() })"""
        took = [page.evaluate(go, str(name)) for name in clicks[1:20]]
        print(f"from a click in the page to card and graph: {told(took)}; {browser.problems}")


def told(milliseconds: list[float]) -> str:
    least, middle, most = min(milliseconds), statistics.median(milliseconds), max(milliseconds)
    return f"{least:.0f} ms (least), {middle:.0f} ms (median), {most:.0f} ms (most)"


def main() -> None:
    given = options(__doc__, layers=26, features=16384, clicks=200)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.arrow"
        made = random_index(given.layers, given.features)
        took, _ = seconds(lambda: write_arrays(file, made.about, made.arrays))
        size, matches = file.stat().st_size / 1e6, len(made.arrays["other"])
        print(f"{len(made.arrays['class']):,} features, {matches:,} matches: {size:.0f} MB")
        print(f"written in {took:.2f} s, opened in {seconds(lambda: read_arrays(file))[0]:.3f} s")
        index = FlowIndex(*read_arrays(file))
        drawn = rng.integers(0, [given.layers, given.features], (given.clicks, 2)).tolist()
        clicks = [FeatureId(layer, "res", i) for layer, i in drawn]
        took = [
            1000 * seconds(lambda name=name: json.dumps(index.neighbourhood([name])))[0]
            for name in clicks
        ]
        print(f"from a click to the kernel's answer: {told(took)}")
        names = (f"{at}/{i}" for at in index.about["sites"] for i in range(given.features))
        own = FlowIndex(index.about, index.arrays, {name: (f"on {name}", "me") for name in names})
        took = [1000 * seconds(lambda: own.search("res/77"))[0] for _ in range(5)]
        print(f"a search in {len(own.labels):,} labels: {told(took)}")
        if CHROMIUM:
            in_a_browser(own, Path(folder), clicks)


if __name__ == "__main__":
    main()
