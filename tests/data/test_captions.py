import pytest

from fastmat.data.captions import preprocess
from fastmat.errors import UserError

EVERYTHING = "A-b/c, d.e'f!g?h\"i(j)k*l#m:n;o~p <Person>"


def test_none_keeps_the_caption_to_the_letter() -> None:
    assert preprocess("  Two\tDogs, running ! ", "none") == "  Two\tDogs, running ! "


def test_albef_removes_each_listed_sign() -> None:
    assert preprocess(EVERYTHING, "albef") == "a b c defghijklmnop person"


def test_blip_blanks_its_signs_and_keeps_the_others() -> None:
    assert preprocess(EVERYTHING, "blip") == "a-b/c, d e'f g?h i j k l m n o p <person>"


@pytest.mark.parametrize("rule", ["albef", "blip"])
def test_white_space_and_length(rule: str) -> None:
    assert preprocess("  Two   dogs\n\n run. ", rule) == "two dogs run"  # type: ignore[arg-type]
    long = " ".join(f"w{i}" for i in range(31))
    assert preprocess(long, rule) == long.removesuffix(" w30")  # type: ignore[arg-type]


def test_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'abelf' is unknown; did you mean 'albef'"):
        preprocess("a dog", "abelf")  # type: ignore[arg-type]
