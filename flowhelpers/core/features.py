"""Names of places and features: sites such as `12/res` and features such as `12/res/4230`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

MODULES = ("res", "mlp", "att")


@dataclass(frozen=True, order=True)
class Site:
    """Where an SAE reads: `res` is a layer's output, `mlp` and `att` what these parts add to it."""

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
    layer, module = _parts(text, "site", "layer/module, such as 12/res", r"(\d+)/([A-Za-z_]+)")
    return Site(int(layer), module)


def parse_feature(text: str) -> FeatureId:
    """Read a feature such as `12/res/4230`; errors as of `parse_site`."""
    form = "layer/module/index, such as 12/res/4230"
    layer, module, index = _parts(text, "feature", form, r"(\d+)/([A-Za-z_]+)/(\d+)")
    return FeatureId(int(layer), module, int(index))


def _parts(text: str, what: str, form: str, pattern: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, re.sub(r"\s*(/|^|$)\s*", r"\1", text))
    if not match:
        raise ValueError(f"{text!r} is not a {what}: expected {form}")
    if match[2] not in MODULES:
        raise ValueError(f"unknown module {match[2]!r} in {text!r}{suggestion(match[2], MODULES)}")
    return match.groups()


def check_choice(what: str, given: str, valid: Iterable[str]) -> None:
    """A ValueError that names the nearest valid value where what is given is not one of them."""
    if given not in (valid := list(valid)):
        raise ValueError(f"unknown {what} {given!r}{suggestion(given, valid)}")


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
    check_choice("module", module, MODULES)
    if module == "res" and layer == 0:
        raise ValueError("layer 0 has no predecessor in the stream: expected mlp or att")
    return Site(layer - (module == "res"), module)
