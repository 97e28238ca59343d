"""Names of places and features: sites such as `12/res` and features such as `12/res/4230`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

MODULES = ("res", "mlp", "att")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model where an SAE reads.

    `layer` is from 0; `module` is `res` (the layer's output), `mlp` or `att` (what that part adds
    to the residual stream).
    """

    layer: int
    module: str

    def __str__(self) -> str:
        return f"{self.layer}/{self.module}"


@dataclass(frozen=True, order=True)
class FeatureId:
    """One direction of one SAE, written `layer/module/index` as in the paper."""

    layer: int
    module: str
    index: int

    @property
    def site(self) -> Site:
        """The site of the feature's SAE."""
        return Site(self.layer, self.module)

    def __str__(self) -> str:
        return f"{self.layer}/{self.module}/{self.index}"


def parse_site(text: str) -> Site:
    """Read a site such as `12/res`; an unknown module is an error that names the nearest."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*([A-Za-z_]+)\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not a site: expected layer/module, such as 12/res")
    return Site(int(match[1]), _module(match[2], text))


def parse_feature(text: str) -> FeatureId:
    """Read a feature such as `12/res/4230`; errors as of `parse_site`."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*([A-Za-z_]+)\s*/\s*(\d+)\s*", text)
    if not match:
        raise ValueError(
            f"{text!r} is not a feature: expected layer/module/index, such as 12/res/4230"
        )
    return FeatureId(int(match[1]), _module(match[2], text), int(match[3]))


def _module(name: str, text: str) -> str:
    if name not in MODULES:
        raise ValueError(f"unknown module {name!r} in {text!r}{suggestion(name, MODULES)}")
    return name


def suggestion(given: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, if one is near, and all of them."""
    names = list(valid)
    near = get_close_matches(given, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"{hint} (valid: {listed})"


def predecessor_sites(site: Site) -> dict[str, Site]:
    """Where the features of a residual site may come from: R_{L-1}, M_L and A_L (paper 3.3).

    Layer 0 has no residual predecessor (CHOICES 5); a site that is not residual is an error.
    """
    if site.module != "res":
        raise ValueError(f"{site} has no predecessors: expected a residual site, such as 12/res")
    modules = ("res", "mlp", "att") if site.layer else ("mlp", "att")
    return {module: predecessor_site(site.layer, module) for module in modules}


def predecessor_site(layer: int, module: str) -> Site:
    """Where the predecessor of a feature of `layer` lies: R_{L-1}, M_L or A_L."""
    if module not in MODULES:
        raise ValueError(f"unknown module {module!r}{suggestion(module, MODULES)}")
    if module == "res" and layer == 0:
        raise ValueError(
            "a feature of layer 0 has no predecessor in the stream: expected mlp or att"
        )
    return Site(layer - (module == "res"), module)
