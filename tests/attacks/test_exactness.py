"""A sample of what `python tests/exactness.py` shows on every caption."""

import os
from argparse import Namespace
from pathlib import Path

import exactness
import pytest


@pytest.mark.parametrize("mode", ["correct", "official"])
@pytest.mark.parametrize("victim", ["clip", "bert"])
def test_real_captions_and_models(victim: str, mode: str, tmp_path: Path) -> None:
    if "FASTMAT_GOLDEN" not in os.environ:
        pytest.skip("FASTMAT_GOLDEN is not set: real captions and models are not at hand")
    beside = Path(os.environ["FASTMAT_GOLDEN"]).parent
    arguments = Namespace(
        victim=victim,
        mode=mode,
        model=beside / "models/clip-mobilenetv2-flickr8k",
        mlm=beside / "models/mlm-captions",
        data=beside / "data/flickr8k_128/test.json",
        images=3,
        out=tmp_path,
    )
    exactness.run_oracle(arguments)
    exactness.run_comparison(arguments)  # exits when a text is wrong
    assert (tmp_path / f"exactness-{victim}-{mode}.json").exists()
