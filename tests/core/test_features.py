"""Sites and features are read and printed as the paper writes them; errors name what is near."""

import pytest

from flowhelpers.core.features import FeatureId, Site, parse_feature, parse_site, suggestion


@pytest.mark.parametrize("text", ["12/res/4230", "0/mlp/0", "25/att/16383"])
def test_a_feature_is_printed_as_it_was_read(text: str):
    layer, module, index = text.split("/")
    feature = parse_feature(text)
    assert feature == FeatureId(int(layer), module, int(index))
    assert str(feature) == text
    assert feature.site == parse_site(f"{layer}/{module}") == Site(int(layer), module)
    assert str(feature.site) == f"{layer}/{module}"


def test_spaces_and_leading_zeros_do_not_make_another_feature():
    assert parse_feature(" 12 / res/004230 ") == parse_feature("12/res/4230")
    assert parse_site(" 03/mlp") == Site(3, "mlp")


@pytest.mark.parametrize(
    "text",
    ["", "x", "12", "12/res", "12/res/", "12/res/-1", "12/res/1.5", "12/res/4/7", "res/12/4"],
)
def test_what_is_no_feature_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match=r"is not a feature: expected .* such as 12/res/4230") as e:
        parse_feature(text)
    assert repr(text) in str(e.value)


@pytest.mark.parametrize("text", ["", "12", "res", "12/res/4230", "-1/res", "12.res"])
def test_what_is_no_site_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match="is not a site: expected layer/module, such as 12/res"):
        parse_site(text)


def test_an_unknown_module_names_the_nearest():
    with pytest.raises(
        ValueError, match="unknown module 'resid' in '12/resid/3'; did you mean 're"
    ):
        parse_feature("12/resid/3")
    with pytest.raises(ValueError, match=r"'attn' in '2/attn'; did you mean 'att'\? \(valid: res,"):
        parse_site("2/attn")
    with pytest.raises(ValueError, match=r"'foo' in '12/foo/3' \(valid: res, mlp, att\)"):
        parse_feature("12/foo/3")


def test_a_suggestion_lists_no_more_than_twenty():
    names = [f"name{i:02}" for i in range(30)]
    assert suggestion("zzz", names) == f" (valid: {', '.join(names[:20])}, …)"
    assert suggestion("name07x", names).startswith("; did you mean 'name07'?")
