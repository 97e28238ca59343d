"""A flow graph as SVG: drawn without a browser, and the same bytes for the same graph."""

import re
from textwrap import wrap
from typing import TYPE_CHECKING

from flowhelpers.core.figures import CLASS_COLOURS, CLASS_MARKS, LINE, NAMES, WRAPPED
from flowhelpers.flow.layout import FONT, flow_layout

if TYPE_CHECKING:
    from flowhelpers.flow.graph import FlowGraph

MARKS = {  # of plotly's symbols, two wide and around 0
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0z",
    "square": "M-.9 -.9h1.8v1.8h-1.8z",
    "diamond": "M0 -1.2L1.2 0L0 1.2L-1.2 0z",
    "triangle-up": "M0 -1.1L1.1 .8H-1.1z",
    "x": "M-1 -.5L-.5 -1L0 -.5L.5 -1L1 -.5L.5 0L1 .5L.5 1L0 .5L-.5 1L-1 .5L-.5 0z",
}
TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" fill="#222222" font-family="sans-serif"
  width="{{ picture.width + 95 }}" height="{{ picture.height + 140 + more }}"
  role="img" aria-label="{{ picture.title }}">
<rect width="100%" height="100%" fill="white"/>
<text x="10" y="30" font-size="17">{{ picture.title }}</text>
<g font-size="12" fill="#595959">
{%- for line in subtitle %}
<text x="10" y="{{ 50 + 17 * loop.index0 }}">{{ line }}</text>
{%- endfor %}
</g>
<g font-size="12" text-anchor="middle" transform="translate(0 {{ more }})">
{%- for kind, colour in kinds.items() %}
<path transform="translate({{ 90 + 110 * loop.index0 }} 71) scale(5)" fill="{{ colour }}"
  d="{{ marks[class_marks[kind]] }}"/>
<text x="{{ 145 + 110 * loop.index0 }}" y="75">{{ kind }}</text>
{%- endfor %}
</g>
<g transform="translate(75 {{ 90 + more }})" font-size="{{ font }}" text-anchor="middle"
  stroke-width="2" paint-order="stroke">
{%- for module, y in picture.lanes.items() %}
<text x="-40" y="{{ y }}" font-size="12">{{ names[module] }}</text>
{%- endfor %}
<text x="-40" y="{{ picture.height + 15 }}" font-size="12">layer</text>
{%- for layer, x in picture.layers.items() %}
<text x="{{ x }}" y="{{ picture.height + 15 }}" font-size="12">{{ layer }}</text>
{%- endfor %}
{%- for edge in picture.edges.to_dict("records") %}
<line id="{{ edge.source }}-{{ edge.target }}" stroke="{{ edge.colour }}"
  x1="{{ edge.x0 }}" y1="{{ edge.y0 }}" x2="{{ edge.x1 }}" y2="{{ edge.y1 }}"
  stroke-width="{{ edge.width }}"{% if edge.dash == "dot" %} stroke-dasharray="2 4"{% endif %}>
<title>{{ edge.hover }}</title></line>
{%- if edge.direction == "forward" %}
<path d="M{{ edge.x - 4 }} {{ edge.y - 4 }}v8l8-4z" fill="white" stroke="#222222"/>
{%- endif %}
{%- endfor %}
{%- for node in picture.nodes.to_dict("records") %}
<a id="{{ node.feature }}"{% if node.link %} href="{{ node.link }}" target="_blank"{% endif %}>
<path transform="translate({{ node.x }} {{ node.y }}) scale({{ node.size / 2 }})"
  d="{{ marks[node.mark] }}" fill="{{ node.colour }}" stroke="{{ node.ring }}"
  vector-effect="non-scaling-stroke"><title>{{ node.hover }}</title></path></a>
{%- set lines = node.caption.split("\\n") %}
{%- set first = 8 - 14 * lines | length - node.size if node.module == "att" else 13 %}
{%- for line in lines %}
<text x="{{ node.x }}" y="{{ node.y + node.size / 2 + first + loop.index0 * 14 }}" stroke="white">
{{- line }}</text>
{%- endfor %}
{%- endfor %}
</g>
</svg>
"""


def flow_svg(
    graph: "FlowGraph", subtitle: str, *, title: str | None = None, by_chance: bool | None = None
) -> str:
    """The picture of `flow_picture` as SVG: hover texts are titles, nodes link to their pages."""
    from jinja2 import Template

    picture = flow_layout(graph, title, by_chance)
    shown = {*picture.nodes["kind"]}
    kinds = {kind: colour for kind, colour in CLASS_COLOURS.items() if kind in shown}
    lines = wrap(subtitle.replace(" · ", "; "), WRAPPED) or [""]
    words = {"subtitle": lines, "more": LINE * (len(lines) - 1), "font": FONT, "names": NAMES}
    looks = {"kinds": kinds, "marks": MARKS, "class_marks": CLASS_MARKS}
    template = Template(TEMPLATE, autoescape=True, trim_blocks=True)
    svg = template.render(picture=picture, **words, **looks)
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\N{REPLACEMENT CHARACTER}", svg)
