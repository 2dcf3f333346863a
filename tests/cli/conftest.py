"""A real set on disk, small: six PNGs with two captions each, and a random masked language model that knows them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_mlm import tiny_parts
from transformers.utils import logging

from fastmat.cli.main import main

CAPTIONS = [
    ["a red dog runs", "the dog plays with a red ball"],
    ["a black cat sits in the snow", "the cat jumps"],
    ["a man with a green hat", "the man sits in the park"],
    ["a woman runs on the street", "the woman plays"],
    ["a blue ball in the water", "the blue ball"],
    ["a boy and a girl jumps", "the girl plays in the snow"],
]
Fastmat = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `test.json` and `images/`."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, captions in enumerate(CAPTIONS):
        pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{i}.png")
        rows.append({"image": f"images/{i}.png", "caption": captions})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def mlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.disable_progress_bar()  # transformers was imported before the command could say so
    folder = tmp_path_factory.mktemp("mlm")
    model, tokenizer = tiny_parts()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(pictures: Path, mlm_folder: Path) -> list[str]:
    """Overrides that name the set and the masked language model."""
    data = {"name": "json", "title": "six", "split": "test", "images": str(pictures)}
    data["annotations"] = str(pictures / "test.json")
    return [f"data={json.dumps(data)}", f"mlm={mlm_folder}", "batch_size=4"]


@pytest.fixture
def fastmat(capsys: pytest.CaptureFixture[str]) -> Fastmat:
    """Runs a command in this process; exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as leave:  # argparse's --help
            code = int(leave.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
