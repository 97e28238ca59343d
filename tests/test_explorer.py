"""The explorer in a browser: the page from disk, and the widget in JupyterLab."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import toys
from browsers import Pages, eventually
from lab_server import open_lab
from playwright.sync_api import Locator, Page, expect

from flowhelpers import explorer
from flowhelpers.__main__ import main
from flowhelpers.core.features import Site
from flowhelpers.explorer import Explorer, explore
from flowhelpers.explorer_index import FlowIndex, flow_index, index_matches
from flowhelpers.explorer_page import LARGEST, explorer_page
from flowhelpers.flow.files import to_attribution_graph
from flowhelpers.flow.graph import flow_graph, keep_nodes
from flowhelpers.labels.describe import read_labels
from flowhelpers.matching.table import match_table
from flowhelpers.steering.plans import load_plan, make_plan
from flowhelpers.suites.load import Suite

SEED, STAND = "1/res/3", ["2/res/4", "1/res/7"]
EVIL = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def index(planted: Suite) -> FlowIndex:
    rows = [(SEED, f"rain {EVIL}", "me"), ("2/res/1", "snow", "me")]
    made = flow_index(
        planted, labels=pd.DataFrame(rows, columns=["feature", "label", "label_from"])
    )
    stand = {name: [] for name in made.about["subjects"]} | {"particle_physics": STAND}
    arrays = {name: array.copy() for name, array in made.arrays.items()}
    for name, subject in ((STAND[0], 0), (SEED, -1)):  # one tells a subject, one tells none
        arrays["subject"][made.place(made.feature(name))] = subject
    return replace(made, about={**made.about, "subjects": stand}, arrays=arrays)


def page_of(index: FlowIndex, seed: str) -> str:
    named = [index.feature(seed)]
    return explorer_page(index, index.records(named), named)


def show(browser: Pages, folder: Path, index: FlowIndex, seed: str) -> Page:
    """A page of an index at a feature, opened."""
    (folder / "page.html").write_text(page_of(index, seed), encoding="utf-8")
    page = browser.new(viewport={"width": 1280, "height": 1000})
    page.goto((folder / "page.html").as_uri())
    expect(page.locator(".fx-card h2")).to_contain_text(seed)
    return page


@pytest.fixture(scope="module")
def page_file(index: FlowIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    path.write_text(page_of(index, SEED), encoding="utf-8")
    return path


@pytest.fixture
def page(page_file: Path, browser: Pages) -> Iterator[Page]:
    browser.problems.clear()
    opened = browser.new(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    opened.goto(page_file.as_uri())
    expect(opened.locator(".fx-card h2")).to_contain_text(SEED)
    yield opened
    opened.context.close()
    assert browser.problems == []


def centre(page: Page) -> str:
    return (page.locator(".fx-card h2").text_content() or "").split(" ")[-1]


def drawn(page: Page | Locator) -> dict[str, tuple[float, float]]:
    """Where each feature stands in the graph, in the page's pixels."""
    places = page.locator(".fx-plot").evaluate(
        """(plot) => {
        const at = plot.getBoundingClientRect(), { xaxis: x, yaxis: y } = plot._fullLayout;
        const place = (trace) => (name, i) => [
            name, at.left + x._offset + x.d2p(trace.x[i]), at.top + y._offset + y.d2p(trace.y[i])];
        return plot.data.flatMap((trace) => (trace.customdata ?? []).map(place(trace)));
        }"""
    )
    return {name: (x, y) for name, x, y in places}


def apart(names: Locator) -> bool:
    """Whether the names of the four lanes are in view, none over another."""
    boxes = names.evaluate_all("all => all.map((each) => each.getBoundingClientRect().toJSON())")
    return len([box for box in boxes if box["width"] > 0]) == 4 and all(
        min(a["right"], b["right"]) < max(a["x"], b["x"])
        or a["bottom"] < b["y"]
        or b["bottom"] < a["y"]
        for a, b in combinations(boxes, 2)
    )


def find(page: Page | Locator, text: str) -> None:
    page.get_by_label("Search").fill(text)
    page.get_by_label("Search").press("Enter")


def saved(page: Page, button: str) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=button, exact=True).click()
    return Path(download.value.path())


def test_click_back_and_forward(page: Page, browser: Pages, planted: Suite):
    graph = flow_graph(planted, SEED, match_table(planted, 5))
    places = drawn(page)
    assert {*places} == {*graph.nodes["feature"]}
    (other,) = (name for name in graph.chain["feature"] if name.startswith("2/"))
    page.mouse.click(*places[other])
    expect(page.locator(".fx-card h2")).to_contain_text(other)
    assert page.url.endswith(f"#{other}")
    page.get_by_role("button", name="Back").click()
    expect(page.locator(".fx-card h2")).to_contain_text(SEED)
    page.get_by_role("button", name="Forward").click()
    expect(page.locator(".fx-card h2")).to_contain_text(other)
    page.reload()
    expect(page.locator(".fx-card h2")).to_contain_text(other)
    browser.shot(page, "explorer-page")


def test_the_card_has_what_the_index_has(page: Page, index: FlowIndex):
    record = index.record(index.feature(SEED))
    card = page.locator(".fx-card").text_content() or ""
    assert f"{record['back']['res']['score'][0]:.2f}, above chance" in card
    assert record["class"] in card
    assert f"lives from layer {record['life'][0]} to {record['life'][1]}" in card
    assert "label: me" in card
    peaks = page.locator(".fx-peak").all_text_contents()
    tokens = [index.about["tokens"][c[0]].replace("\n", "⏎") for c in record["contexts"]]
    assert peaks == [token if token.strip() else token.replace(" ", "␣") for token in tokens]


def test_a_label_with_html_is_shown_as_text(page: Page):
    assert EVIL in (page.locator(".fx-card p").first.text_content() or "")
    assert page.locator(".fx img").count() == 0
    assert page.title().startswith("The flow of")
    find(page, "rain")
    assert EVIL in (page.locator(".fx-found li").first.text_content() or "")


def test_search_by_name_label_token_and_subject(page: Page, index: FlowIndex):
    find(page, "2/res/5")
    expect(page.locator(".fx-card h2")).to_contain_text("2/res/5")
    find(page, "snow")
    page.locator(".fx-found button").first.click()
    expect(page.locator(".fx-card h2")).to_contain_text("2/res/1")
    some = index.record(index.feature("1/mlp/2"))
    token = next(t.strip() for t in some["writes"] if len(t.strip()) > 1)
    find(page, token)
    listed = page.locator(".fx-found button")
    expect(listed.first).to_be_visible()
    assert listed.count() <= 60
    find(page, "Particle physics")  # only through those that stand for it, the best first
    expect(page.locator(".fx-say")).to_contain_text("2 found")
    assert listed.all_text_contents() == STAND
    expect(page.locator(".fx-found li").first).to_contain_text("stands for particle physics")
    listed.first.click()
    card = page.locator(".fx-card")
    subject, at = next(iter(index.about["subjects"])), index.record(index.feature(STAND[0]))
    expect(card).to_contain_text(
        f"tells passages on {subject} best (AUC {at['auc']:.2f}, by shuffled subjects"
        f" {at['chance']:.2f} at most); stands for particle_physics"
    )
    find(page, SEED)
    expect(card.locator("h2")).to_contain_text(SEED)
    expect(card).not_to_contain_text("tells passages")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  ", "Nothing to search for"),
        ("1/res/99", "No feature 1/res/99: 1/res has features 0 to 15"),
        ("7/res/1", "No SAE at 7/res: there are 0/att"),
        ("qqqq", "as label, token or subject. Subjects that have one: particle_physics."),
        ("weddings", "No feature stands for weddings. Subjects that have one"),
    ],
)
def test_what_is_not_there_is_said_in_words(page: Page, text: str, said: str):
    find(page, text)
    expect(page.locator(".fx-say")).to_contain_text(said)
    assert centre(page) == SEED


def test_sliders_cut_and_widen_the_graph(browser: Pages, tmp_path: Path):
    suite, seed = toys.related_suite(), "2/res/12"
    table, widths = match_table(suite, 5), {site: 40 for site in sorted(suite.saes)}
    about, arrays = index_matches(table, widths)
    links = {site: f"https://example.com/{site}/" for site in about["sites"]}
    bare = FlowIndex(about | {"links": links}, arrays)  # of no texts, and without labels
    page = show(browser, tmp_path, bare, seed)
    link = page.get_by_role("link", name="on Neuronpedia")
    assert link.get_attribute("href") == "https://example.com/2/res/12"
    for name, limit in product(
        (seed, "0/res/9", "0/res/3", "3/res/20", "2/mlp/7", "1/att/4"), (0.3, 0.6, 0.8)
    ):
        find(page, name)
        expect(page.locator(".fx-card h2")).to_contain_text(name)
        less = flow_graph(suite, name, table, t_res=limit, t_mlp=limit, t_att=limit)
        for score in ("cut s(R)", "cut s(M)", "cut s(A)"):
            page.get_by_label(score).fill(str(limit))
        eventually(lambda these={*less.nodes["feature"]}: {*drawn(page)} == these)
    find(page, seed)
    whole = {*flow_graph(suite, seed, table).nodes["feature"]}
    eventually(lambda: {*drawn(page)} < whole)
    expect(page.get_by_text("The chain is cut")).to_be_visible()
    for name in ("cut s(R)", "cut s(M)", "cut s(A)"):
        page.get_by_label(name).fill("0")
    page.get_by_label("ranks shown").fill("3")
    own = table[(table["layer"] == 2) & (table["feature"] == 12) & (table["rank"] <= 3)]
    own = own[(own["direction"] == "backward") & (own["module"] == "mlp")]
    more = whole | {f"2/mlp/{index}" for index in own["source"]}
    eventually(lambda: {*drawn(page)} > more)
    page.get_by_label("above chance only").check()
    eventually(lambda: len(drawn(page)) < len(whole) + 10)
    browser.shot(page, "explorer-ranks")
    page.context.close()
    assert browser.problems == []


def test_direct_matches_stand_beside_the_chain(page: Page, index: FlowIndex):
    page.get_by_label("direct matches").check()
    expect(page.get_by_text("Direct matches", exact=True)).to_be_visible()
    for layer, i, score in index.record(index.feature(SEED))["direct"]:
        row = page.locator(".fx-card tr", has_text=f"{layer}/res/{i}")
        expect(row.first).to_contain_text(f"{score:.2f}, chance")


def test_bars_of_the_whole_model_list_their_features(page: Page, index: FlowIndex):
    page.get_by_role("button", name="Whole model").click()
    views = {"class": "classes", "born": "births", "life": "life spans: layers lived"}
    for view, shown in views.items():
        page.get_by_label("bars count").select_option(shown)
        for value, counts in index.about["overview"][view].items():
            named = {"mlp": "MLP", "att": "attention"}.get(value, value)
            for layer, count in enumerate(counts):
                if not count:
                    continue
                features = "1 feature" if count == 1 else f"{count} features"
                named = "1 layer$" if named == "1" else named
                page.get_by_role(
                    "button", name=re.compile(rf"^{features} of layer {layer}: .*{named}")
                ).first.click()
                names = index.listed(view, layer, value)
                expect(page.locator(".fx-found button")).to_have_text(names)
    page.locator(".fx-found button").first.click()
    expect(page.locator(".fx-card h2")).to_contain_text(names[0])


def test_a_set_is_pinned_saved_and_loaded(page: Page, planted: Suite, tmp_path: Path):
    graph = flow_graph(planted, SEED, match_table(planted, 5))
    chosen = [*graph.chain["feature"]]
    for name in chosen:
        find(page, name)
        page.get_by_role("button", name="Pin", exact=True).click()
    page.get_by_label("name", exact=True).fill("wet weather")
    page.get_by_label(f"label of {SEED}").fill('rain, "heavy"')
    page.get_by_label(f"label of {SEED}").press("Tab")
    plan = load_plan(saved(page, "Save as plan"))
    assert plan.about == "wet weather"
    mine = make_plan(planted, chosen, 1.0).table()
    assert plan.table()["feature"].tolist() == chosen
    assert plan.table()["scale"].tolist() == pytest.approx(mine["scale"].tolist(), rel=1e-4)

    csv = tmp_path / "labels.csv"
    csv.write_bytes(saved(page, "Save labels").read_bytes())
    table = read_labels(csv, planted).set_index("feature")["label"]
    assert table[SEED] == 'rain, "heavy"'
    assert {*table.index} == {*chosen}
    said = read_labels(csv, planted).set_index("feature")["label_from"]
    assert said[SEED] == "labels.csv"
    assert {*said.drop(SEED)} == {"top contexts and logit lens"}

    exported = json.loads(saved(page, "Save for circuit-tracer and Neuronpedia").read_text())
    theirs = to_attribution_graph(keep_nodes(graph, chosen), "wet-weather")
    plain = [
        [{k: v for k, v in node.items() if k != "clerp"} for node in each["nodes"]]
        for each in (exported, theirs)
    ]
    assert plain[0] == plain[1]
    assert exported["metadata"].keys() == theirs["metadata"].keys()
    assert exported["qParams"].keys() == theirs["qParams"].keys()
    joined = [
        {(link["source"], link["target"]): link["weight"] for link in each["links"]}
        for each in (exported, theirs)
    ]
    assert joined[0].keys() == joined[1].keys()
    assert [*joined[0].values()] == pytest.approx([joined[1][key] for key in joined[0]], abs=1e-4)
    assert exported["qParams"]["supernodes"][0][0] == "wet weather"

    of_set = saved(page, "Save set")
    page.reload()  # a reload keeps what was pinned
    expect(page.get_by_text(f"Pinned features ({len(chosen)})")).to_be_visible()
    for name in chosen:
        page.get_by_label(f"unpin {name}").click()
    load = page.get_by_label("load a set or plan")
    load.set_input_files({"name": "s.json", "mimeType": "text/json", "buffer": of_set.read_bytes()})
    expect(page.get_by_text(f"Pinned features ({len(chosen)})")).to_be_visible()
    expect(page.get_by_label(f"label of {SEED}")).to_have_value('rain, "heavy"')
    expect(page.get_by_text("typed by hand")).to_have_count(1)
    expect(page.locator(".fx-pins").get_by_text("by top contexts and")).to_have_count(2)
    bare = {"suite": planted.name, "steps": [{"feature": "2/res/1", "label": None, "strength": 4}]}
    file = {"name": "s.json", "mimeType": "text/json", "buffer": json.dumps(bare).encode()}
    load.set_input_files(file)  # pyright: ignore[reportArgumentType]
    expect(page.locator(".fx-say")).to_contain_text(
        "1 feature loaded; the plan's strengths are not"
    )
    expect(page.get_by_label("label of 2/res/1")).to_have_value("snow")
    expect(page.locator(".fx-pins").get_by_text("by me")).to_be_visible()


def test_an_address_that_is_no_feature_is_told(page: Page):
    goes = "(hash) => { location.hash = hash }"
    page.evaluate(goes, "2/res/5")
    expect(page.locator(".fx-card h2")).to_contain_text("2/res/5")
    for hash, said in (("foo", "“foo” is no feature: expected one"), ("9/res/1", "No SAE at")):
        page.evaluate(goes, hash)
        expect(page.locator(".fx-say")).to_contain_text(said)
        assert centre(page) == "2/res/5"
        assert page.url.endswith("#2/res/5")
    page.goto(page.url.split("#")[0] + "?#foo")
    expect(page.locator(".fx-say")).to_contain_text("“foo” is no feature")
    assert centre(page) == SEED


def test_a_token_of_spaces_is_shown(index: FlowIndex, browser: Pages, tmp_path: Path):
    record = index.record(index.feature(SEED))
    tokens = [*index.about["tokens"]]
    for at, blank in zip([c[0] for c in record["contexts"]], ("  ", "\n", "\u00a0"), strict=True):
        tokens[at] = blank
    blank = replace(index, about={**index.about, "tokens": tokens}, labels={})
    page = show(browser, tmp_path, blank, SEED)
    expect(page.locator(".fx-card p").first).to_contain_text("active at ␣␣, ⏎, U+00A0; writes")
    assert page.locator(".fx-peak").all_text_contents() == ["␣␣", "⏎", "U+00A0"]
    page.context.close()
    assert browser.problems == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "bad.json is not JSON"),
        ("[]", "holds no set and no plan"),
        (
            '{"format": "flowhelpers feature set, version 1", "suite": "other", "features": []}',
            "This set is of suite other: expected one of",
        ),
        ('{"suite": "SUITE", "steps": [{"feature": "1/res/99"}]}', "No feature 1/res/99"),
        ('{"suite": "SUITE", "steps": [{"feature": "<b>x</b>"}]}', "“<b>x</b>” is no feature"),
        ('{"suite": "SUITE", "steps": [{"feature": 3}]}', "Entry 1 of this file names no feature"),
        ('{"suite": "SUITE", "steps": [null]}', "Entry 1 of this file names no feature"),
        (
            '{"suite": "SUITE", "steps": [{"feature": "1/res/3", "label": {"a": 1}}]}',
            'The label of 1/res/3 is no text but {"a":1}',
        ),
        ("null", "holds no set and no plan"),
    ],
)
def test_sets_that_do_not_fit_are_refused_in_words(
    page: Page, index: FlowIndex, text: str, said: str
):
    content = text.replace("SUITE", index.about["suite"]).encode()
    load = page.get_by_label("load a set or plan")
    load.set_input_files({"name": "bad.json", "mimeType": "text/json", "buffer": content})
    expect(page.locator(".fx-say")).to_contain_text(said)
    expect(page.get_by_text("Pinned features (0)")).to_be_visible()


def test_keys_alone_reach_every_feature(page: Page):
    page.get_by_text("features as a table").focus()
    page.keyboard.press("Enter")
    rows = page.locator("section table button")
    assert {*rows.all_text_contents()} == {*drawn(page)}
    other = next(name for name in rows.all_text_contents() if name != SEED)
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.textContent") != other:
        page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator(".fx-card h2")).to_contain_text(other)
    focus = page.locator(":focus")
    expect(focus).to_have_text(other)
    page.get_by_role("button", name="Pin", exact=True).focus()
    for name in ("Unpin", "Pin", "Unpin"):  # drawn anew, and the focus is on it still
        page.keyboard.press("Enter")
        expect(focus).to_have_text(name)
    page.get_by_label(f"unpin {other}").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".fx-pins :focus")).to_be_attached()
    page.get_by_role("button", name="Back").focus()
    page.keyboard.press("Enter")  # of what is past no more
    expect(focus).to_have_text("Forward →")


def test_many_layers_have_texts_and_the_centre_is_in_view(browser: Pages, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    rows = {Site(at, "res"): torch.randn(6, 16, generator=generator) for at in range(26)}
    deep = match_table(toys.bare_suite(rows, 26), 5)
    about, arrays = index_matches(deep, dict.fromkeys(rows, 6))
    links = dict.fromkeys(about["sites"], "")
    labels = {f"{at}/res/{i}": (f"rain {i}", "me") for at in range(26) for i in range(6)}
    index = FlowIndex(about | {"links": links}, arrays, labels)
    page = show(browser, tmp_path, index, "20/res/2")
    texts = page.locator(".fx-plot .textpoint").all_text_contents()
    assert sum("rain" in text for text in texts) == 26
    box = page.locator(".fx-scroll", has=page.locator(".fx-plot")).bounding_box()
    assert box
    assert box["x"] < drawn(page)["20/res/2"][0] < box["x"] + box["width"]
    browser.shot(page, "explorer-26-layers")
    page.context.close()
    assert browser.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_at_420_px_and_in_the_dark(page_file: Path, browser: Pages, scheme: Any):
    narrow = browser.new(viewport={"width": 420, "height": 900}, color_scheme=scheme)
    narrow.goto(page_file.as_uri())
    expect(narrow.locator(".fx-card h2")).to_contain_text(SEED)
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 420
    ink, ground = narrow.evaluate(
        """() => { const s = getComputedStyle(document.querySelector(".fx")); return [s.color,
        s.backgroundColor].map((c) => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)) }"""
    )
    assert (ink > ground) == (scheme == "dark")
    assert abs(ink - ground) > 500
    size = narrow.evaluate(
        "parseFloat(getComputedStyle(document.querySelector('.xtick text')).fontSize)"
    )
    assert size >= 12
    browser.shot(narrow, f"explorer-420-{scheme}")
    narrow.get_by_role("button", name="Pin", exact=True).click()
    saved(narrow, "Save set")  # far below what is said, which stays in view
    assert narrow.evaluate("scrollY") > 500
    expect(narrow.locator(".fx-say")).to_contain_text("saved as set.json")
    say = narrow.locator(".fx-say").bounding_box()
    assert say is not None
    assert 0 <= say["y"] < 900 - say["height"]
    narrow.get_by_label("ranks shown").fill("5")
    narrow.get_by_label("direct matches").check()
    names = narrow.locator(".fx-plot").get_by_text(re.compile("^(attention|stream|MLP|direct)$"))
    for width in (420, 900):  # the names of the lanes do not collide
        narrow.set_viewport_size({"width": width, "height": 900})
        eventually(lambda: apart(names))
    narrow.context.close()
    assert browser.problems == []


def test_without_javascript_the_page_says_so(page_file: Path, browser: Pages):
    plain = browser.new(java_script_enabled=False)
    plain.goto(page_file.as_uri())
    expect(plain.get_by_text("This page needs JavaScript")).to_be_visible()
    plain.context.close()


def test_a_page_of_some_features_says_what_it_lacks(
    index: FlowIndex, browser: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flowhelpers.explorer_index.SMALL", 10)
    part = show(browser, tmp_path, index, SEED)
    expect(part.get_by_text(f"This page holds what is near {SEED}")).to_be_visible()
    near = index.neighbourhood([index.feature(SEED)])
    brief = next(name for name, record in near.items() if "on" not in record)
    find(part, brief)
    expect(part.locator(".fx-say")).to_contain_text(f"{brief} is not in this page")
    assert centre(part) == SEED
    part.context.close()
    assert browser.problems == []


# ---- the kernel's side, without a browser


def asked(widget: Explorer, what: str, **given: Any) -> dict[str, Any]:
    """What the kernel answers to a message of the view."""
    sent: list[dict[str, Any]] = []
    widget.send = lambda content, buffers=None: sent.append(content | {"buffers": buffers})
    widget._answer(widget, {"ask": what, "given": given, "id": "7"}, [])
    assert sent[0].pop("id") == "7"
    return sent[0]


@pytest.fixture
def view(planted: Suite, index: FlowIndex) -> Explorer:
    return Explorer(planted, index, SEED)


def test_a_feature_is_switched_off_and_turned_up(view: Explorer, planted: Suite):
    watched = ["1/res/3", *[f"2/res/{i}" for i in range(16)]]
    text = "Rain fell on the 7 hills all day, and the rivers rose."
    off, same, up = (
        asked(view, "change", features=["1/res/3"], r=r, text=text, watched=watched)["watched"]
        for r in (0.0, 1.0, 3.0)
    )
    before = max(off[0]["before"])
    assert before > 0
    assert max(off[0]["after"]) == pytest.approx(0, abs=1e-5)
    assert max(up[0]["after"]) > 1.5 * before
    for row in same:
        assert row["after"] == pytest.approx(row["before"], abs=1e-5)
    assert any(row["after"] != pytest.approx(row["before"], abs=1e-3) for row in off[1:])
    assert (
        "no sentence"
        in asked(view, "change", features=["1/res/3"], r=0.0, text=" ", watched=watched)["error"]
    )
    assert "pin some" in asked(view, "change", features=[], r=0.0, text="a", watched=[])["error"]


def test_steered_texts_stand_beside_unsteered_of_the_same_seed(view: Explorer):
    given = {"features": ["1/res/3", "2/res/1"], "prompt": "Rain", "strategy": "single"}
    one, again, none = (
        asked(view, "steer", **given, strength=strength, seed=3) for strength in (40.0, 40.0, 0.0)
    )
    assert one == again
    assert one["unsteered"] == none["unsteered"] == none["steered"]
    assert one["steered"] != one["unsteered"]
    assert len(one["steered"]) == explorer.SAMPLES
    assert one["about"].startswith("features added: 1, in units of each feature's threshold")
    assert (
        "strategy" in asked(view, "steer", **given | {"strategy": "x"}, strength=1, seed=0)["error"]
    )


def test_of_a_large_suite_the_kernel_answers_click_by_click(
    view: Explorer, index: FlowIndex, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flowhelpers.explorer_index.SMALL", 10)
    near = asked(view, "near", feature=SEED)["records"]
    assert near == index.neighbourhood([index.feature(SEED)])
    assert [*asked(view, "search", text="rain")["records"]] == [SEED]
    bars = index.about["overview"]["class"]["translated"]
    listed = asked(view, "listed", view="class", layer=1, value="translated")["records"]
    assert len(listed) == bars[1]
    direct = index.record(index.feature(SEED))["direct"]
    found = asked(view, "direct", feature=SEED)["direct"]
    assert np.array(found) == pytest.approx(np.array(direct), abs=1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(Suite, "sae", None)  # the second time, none is read
        assert asked(view, "direct", feature=SEED)["direct"] == found
    monkeypatch.setattr("flowhelpers.explorer_reading.KEPT", 16 * 32 * 4)
    view.kept.clear()
    assert len(asked(view, "direct", feature=SEED)["direct"]) == 2
    assert len(view.kept) == 1
    writes = index.record(index.feature(SEED))["writes"]
    assert asked(view, "writes", features=[SEED])["writes"] == {SEED: writes}
    asked(view, "keep", feature="2/res/1", pinned=["2/res/1", SEED])
    assert make_plan(view.suite, view.pinned, 1.0).table()["feature"].tolist() == view.pinned
    assert view.feature == "2/res/1"
    assert "no feature 1/res/99" in asked(view, "near", feature="1/res/99")["error"]


def test_without_a_live_front_end_there_is_a_still_picture(planted: Suite):
    picture = explore(planted, SEED)
    assert SEED in picture.layout.title.text
    assert "a still picture" in picture.layout.title.subtitle.text
    assert "Births" in explore(planted).layout.title.text
    with pytest.raises(ValueError, match="no feature 1/res/99"):
        explore(planted, "1/res/99")


def test_the_command_writes_a_page(
    planted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "page.html"
    assert main(["explore", str(planted_folder), SEED, "--html", str(path)]) == 0
    assert re.search(r"page\.html: all of .*, [\d.]+ MB", capsys.readouterr().out)
    assert path.stat().st_size < LARGEST
    assert main(["explore", str(planted_folder), "1/res/99", "--html", str(path)]) == 2
    assert "1/res has features 0 to 15" in capsys.readouterr().err


def test_what_no_page_can_be_made_of_is_refused_before_any_work(
    planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(explorer, "flow_index", None)
    monkeypatch.setattr("flowhelpers.labels.neuronpedia.neuronpedia_labels", None)
    for path, small, said in (
        (tmp_path, 1000, "is a folder: expected a file"),
        (tmp_path / "file/page.html", 1000, "cannot make the folder"),
        (tmp_path / "page.html", 10, "is too large for one page: name the features"),
    ):
        monkeypatch.setattr("flowhelpers.explorer_index.SMALL", small)
        assert main(["explore", str(planted_folder), "--fetch-labels", "--html", str(path)]) == 2
        assert said in capsys.readouterr().err


# ---- JupyterLab


@pytest.fixture
def notebook(planted_folder: Path, tmp_path: Path) -> Path:
    """A notebook that explores the planted suite, and then as if it were large."""
    cells = [
        f"from flowhelpers import explore, explorer_index, load_suite\n"
        f"suite = load_suite({str(planted_folder)!r})\nexplore(suite, {SEED!r})",
        f"explorer_index.SMALL = 10\nlarge = explore(suite, {SEED!r})\nlarge",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path / "explore.ipynb")
    return tmp_path / "explore.ipynb"


def test_the_widget_answers_in_jupyterlab(notebook: Path, browser: Pages, planted: Suite):
    before = notebook.stat().st_size
    with open_lab(notebook.parent) as address:
        browser.problems.clear()
        page = browser.new(viewport={"width": 1400, "height": 1000})
        page.goto(f"{address.split('/lab')[0]}/lab/tree/explore.ipynb?reset")
        page.locator(".jp-Notebook .jp-Cell").first.click(timeout=120_000)
        page.get_by_text("Python 3", exact=False).first.wait_for(timeout=60_000)
        chain = flow_graph(planted, SEED, match_table(planted, 5)).chain["feature"]
        (other,) = (name for name in chain if name.startswith("2/"))
        for place in range(2):  # the first has all records at once, the second asks for each click
            page.locator(".jp-CodeCell .cm-content").nth(place).click()
            page.keyboard.press("Shift+Enter")
            view = page.locator(".fx").nth(place)
            card = view.locator(".fx-card h2")
            expect(card).to_contain_text(SEED, timeout=120_000)
            for _ in range(20):  # until JupyterLab has stopped scrolling to the cell below
                view.locator(".fx-plot").scroll_into_view_if_needed()
                page.mouse.click(*drawn(view)[other])
                page.wait_for_timeout(500)
                if other in (card.text_content() or ""):
                    break
            expect(card).to_contain_text(other)
            expect(view.get_by_text("Writes (logit lens)")).to_be_visible(timeout=60_000)
            view.get_by_label("direct matches").check()
            expect(view.get_by_text("Direct matches", exact=True)).to_be_visible(timeout=60_000)
            if place == 0:
                view.get_by_role("button", name="Pin", exact=True).click()
            expect(view.get_by_label(f"unpin {other}")).to_be_visible()  # by the second view, too
            view.get_by_role("button", name="Switch off").click()
            expect(view.get_by_text("at most").first).to_be_visible(timeout=60_000)
            view.get_by_role("button", name="Write", exact=True).click()
            expect(view.get_by_text("unsteered", exact=True)).to_be_visible(timeout=60_000)
            view.get_by_role("button", name="Whole model").click()
            view.locator("section table button").first.click()
            view.locator(".fx-found button").first.click()
            expect(card).not_to_contain_text("The whole model")
            view.get_by_role("button", name="Back").click()
            expect(card).to_contain_text("The whole model")
            view.locator(".fx-plot").scroll_into_view_if_needed()
            browser.shot(page, f"explorer-lab-{place}")
        find(view, "1/res/99")
        expect(view.locator(".fx-say")).to_contain_text("No feature 1/res/99")
        button = page.locator("[data-command='docmanager:save'], button[title^='Save']").first
        with page.expect_response(lambda r: r.request.method == "PUT" and "contents" in r.url):
            button.click()
        assert before < notebook.stat().st_size < 10_000  # no records, no plotly.js
        find(view, "1/mlp/2")  # which has no predecessors
        expect(view.locator(".fx-card h2")).to_contain_text("1/mlp/2")
        offered = view.get_by_label("change").locator("option").all_text_contents()
        assert offered == ["this feature", "the pinned set"]
        page.locator("[data-command='notebook:restart-kernel']").first.click()
        page.locator(".jp-Dialog .jp-mod-accept").click()
        view.get_by_role("button", name="Switch off").click()
        expect(view.locator(".fx-say")).to_contain_text("The kernel was restarted")
        view.get_by_role("button", name="Whole model").click()
        expect(view.locator(".fx-say")).to_contain_text("run the cell again")
        page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle")).wait_for(
            timeout=60_000
        )
        page.context.close()
        assert [each for each in browser.problems if "fx" in each or "request to" in each] == []
