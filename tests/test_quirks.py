"""The table of quirks, its fields and its preset say the same."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import fastmat
from fastmat import quirks
from fastmat.quirks import Quirks


def test_presets() -> None:
    assert asdict(Quirks()) == {
        "candidate_row_offset": 1,
        "append_sep": True,
        "text_max_length": None,
        "mid_max_length": None,
        "round_trip": False,
        "blanks_in_candidates": False,
        "case_sensitive_filters": False,
        "antialias": True,
        "one_sided_start": False,
        "clamp_start": True,
        "last_caption_only": False,
        "raw_images": False,
        "zero_history": False,
        "pairs_only": False,
        "summed_kl": False,
        "cosine_logits": False,
        "frozen_siamese": False,
    }
    assert asdict(Quirks.official()) == {
        "candidate_row_offset": 0,
        "append_sep": False,
        "text_max_length": 77,
        "mid_max_length": 30,
        "round_trip": True,
        "blanks_in_candidates": True,
        "case_sensitive_filters": True,
        "antialias": False,
        "one_sided_start": True,
        "clamp_start": False,
        "last_caption_only": True,
        "raw_images": True,
        "zero_history": True,
        "pairs_only": True,
        "summed_kl": True,
        "cosine_logits": True,
        "frozen_siamese": True,
    }


def test_every_field_stands_in_the_table_with_both_values_and_is_read_somewhere() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", quirks.__doc__ or "", flags=re.MULTILINE))
    sources = [path.read_text() for path in Path(fastmat.__file__).parent.glob("*/*.py")]
    for field in fields(Quirks):
        correct, published, _ = rows.pop(field.name).split(" | ")
        assert correct.startswith(str(field.default))
        assert published.startswith(str(getattr(Quirks.official(), field.name)))
        assert any(re.search(rf"quirks\.{field.name}\b", source) for source in sources), field.name
    assert not rows
