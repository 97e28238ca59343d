"""A flow graph as SVG: drawn without a browser, and the same bytes for the same graph."""

import html
import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from flowhelpers.core.figures import CLASS_COLOURS, GREY, INK, MARGIN, NAMES
from flowhelpers.flow.layout import flow_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flowhelpers.flow.graph import FlowGraph
    from flowhelpers.flow.layout import Layout

SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "flowhelpers"}
HALO = "text {paint-order: stroke; stroke: white; stroke-width: 2px}"
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left", "center": "center"}
TOWARDS = {"top": 1, "bottom": -1, "left": -1, "right": 1, "center": 0}


def flow_svg(graph: "FlowGraph", subtitle: str) -> str:
    """The picture of `flow_picture` as SVG: hovers are titles, and nodes lead to their pages."""
    from matplotlib import style
    from matplotlib.figure import Figure

    layout = flow_layout(graph)
    left, right, top, bottom = (MARGIN[side] for side in "lrtb")
    width, height = layout.width + left + right, layout.height + top + bottom
    with style.context(["default", SETTINGS]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text
        figure = Figure(figsize=(width / 72, height / 72))
        box = left / width, bottom / height, layout.width / width, layout.height / height
        axes = figure.add_axes(box)
        _draw(axes, layout)
        _legend(axes, layout)
        for text, y, size, colour in ((layout.title, 30, 17, INK), (subtitle, 50, 12, GREY)):
            place = {"x": 0.01, "y": 1 - y / height, "fontsize": size, "color": colour}
            figure.text(s=_printable(text), parse_math=False, **place)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    records = [*layout.nodes.to_dict("records"), *layout.edges.to_dict("records")]
    titles = {_name(record): html.escape(_printable(record["hover"])) for record in records}
    return re.sub(
        r'<g id="([a-z\d/-]+)">',
        lambda group: f"{group[0]}<title>{titles[group[1]]}</title>",
        buffer.getvalue().replace("</style>", HALO + "</style>", 1),
    )


def _draw(axes: "Axes", layout: "Layout") -> None:
    arrow = 0.6 * layout.nodes["size"].min()
    for edge in layout.edges.sort_values("above", kind="stable").to_dict("records"):
        ends = [edge["x0"], edge["x1"]], [edge["y0"], edge["y1"]]
        line = {"color": edge["colour"], "ls": "-" if edge["above"] else ":", "lw": edge["width"]}
        axes.plot(*ends, **line, solid_capstyle="butt", gid=_name(edge), zorder=1)
        if edge["direction"] == "forward":
            axes.plot(edge["x"], edge["y"], ">", ms=arrow, mfc="white", mec=INK, zorder=2)
    for node in layout.nodes.to_dict("records"):
        place, ring = (node["x"], node["y"]), INK if node["is_seed"] else "white"
        fill = {"mfc": node["colour"], "mec": ring, "mew": node["ring"], "ms": node["size"]}
        axes.plot(*place, "o", gid=_name(node), url=node["link"] or None, zorder=3, **fill)
        vertical, horizontal = node["caption_at"].split()
        away = node["size"] / 2 + 2
        offset = away * TOWARDS[horizontal], away * TOWARDS[vertical]
        look = {"ha": OPPOSITE[horizontal], "va": OPPOSITE[vertical], "fontsize": layout.font}
        look |= {"textcoords": "offset points", "parse_math": False, "zorder": 4}
        axes.annotate(_printable(node["caption"]), place, offset, **look)
    axes.set(xlim=layout.across, ylim=layout.up, xlabel="layer")
    axes.set_xticks(sorted(layout.nodes["layer"].unique()))
    axes.set_yticks([*layout.lanes.values()], [NAMES[module] for module in layout.lanes])
    axes.spines[:].set_visible(False)


def _legend(axes: "Axes", layout: "Layout") -> None:
    for kind, colour in CLASS_COLOURS.items():
        if kind in set(layout.nodes["kind"]):
            axes.plot([], [], "o", color=colour, label=kind)
    if "forward" in set(layout.edges["direction"]):
        axes.plot([], [], ">", mfc="white", mec=INK, label="chosen by the earlier feature")
    axes.plot([], [], color=INK, lw=3, label="above chance")
    axes.plot([], [], color=GREY, lw=3, ls=":", label="not above")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=9, frameon=False)


def _name(record: dict[str, Any]) -> str:
    """A node's feature, or the two that an edge joins."""
    return record.get("feature") or f"{record['source']}-{record['target']}"


def _printable(text: str) -> str:
    """The text without what XML cannot hold."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
