"""A flow graph as SVG: drawn without a browser, and the same bytes for the same graph."""

import re
from typing import TYPE_CHECKING

from flowhelpers.core.figures import CLASS_COLOURS, NAMES
from flowhelpers.flow.layout import flow_layout

if TYPE_CHECKING:
    from flowhelpers.flow.graph import FlowGraph

TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" fill="#222222" font-family="sans-serif"
  width="{{ picture.width + 95 }}" height="{{ picture.height + 140 }}">
<rect width="100%" height="100%" fill="white"/>
<text x="10" y="30" font-size="17">{{ picture.title }}</text>
<text x="10" y="50" font-size="12" fill="#8C8C8C">{{ subtitle }}</text>
<g font-size="12" text-anchor="middle">
{%- for kind, colour in kinds.items() %}
<circle cx="{{ 90 + 110 * loop.index0 }}" cy="71" r="5" fill="{{ colour }}"/>
<text x="{{ 145 + 110 * loop.index0 }}" y="75">{{ kind }}</text>
{%- endfor %}
</g>
<g transform="translate(75 90)" font-size="{{ picture.font }}" text-anchor="middle"
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
<circle cx="{{ node.x }}" cy="{{ node.y }}" r="{{ node.size / 2 }}" fill="{{ node.colour }}"
  stroke="{{ node.ring }}"><title>{{ node.hover }}</title></circle></a>
{%- set lines = node.caption.split("\\n") %}
{%- set first = 8 - 12 * lines | length - node.size if node.module == "att" else 12 %}
{%- for line in lines %}
<text x="{{ node.x }}" y="{{ node.y + node.size / 2 + first + loop.index0 * 12 }}" stroke="white">
{{- line }}</text>
{%- endfor %}
{%- endfor %}
</g>
</svg>
"""


def flow_svg(graph: "FlowGraph", subtitle: str) -> str:
    """The picture of `flow_picture` as SVG: hover texts are titles, nodes link to their pages."""
    from jinja2 import Template

    picture = flow_layout(graph)
    shown = {*picture.nodes["kind"]}
    kinds = {kind: colour for kind, colour in CLASS_COLOURS.items() if kind in shown}
    template = Template(TEMPLATE, autoescape=True, trim_blocks=True)
    svg = template.render(picture=picture, subtitle=subtitle, kinds=kinds, names=NAMES)
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\N{REPLACEMENT CHARACTER}", svg)
