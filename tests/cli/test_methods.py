"""Every defence trains on the built-in set from the command line: on captions and, where it can, on classes."""

import json
from pathlib import Path

import pytest
import torch
from cli.conftest import Fastmat
from safetensors.torch import load_file

from fastmat.build import DEFENCES
from fastmat.models.tiny import tiny_clip

CAPTIONS = "{name: digits, split: val}"
CLASSES = "{name: labelled_digits, split: val, label: digit}"
RUN = ["model=tiny", "limit=24", "batch_size=8", "threat.eps=8/255", "train={steps: 2, lr: 0.01, log_every: 1}"]
QUICK = {"fare": ", steps: 2", "tecoa_itr": ", steps: 2", "sim_clip": ", steps: 2", "mmcoa": ", steps: 2"}
VARIANTS = [
    ("mat", "text_search: embedding_space, order: image_text"),
    ("mat", "text_search: {name: embedding_space, choice: kl, max_norm: 0.01}, objective: kl, order: independent"),
    ("mat", "text_search: {name: word_substitution, choice: kl}, objective: squared_l2, trains: [image]"),
    ("mat", "pairs: {adv-adv: 0.5, clean-clean: 0.5}, distances: {image-adv-teacher: 0.1, text-adv-clean: 0.1}"),
    ("mmcoa", "quirks: {pairs_only: true}"),
    ("pmg_aft", "quirks: {summed_kl: true, cosine_logits: true}"),
    ("sim_clip", "quirks: {frozen_siamese: true}"),
]
ON_CLASSES = ["tecoa", "pmg_aft", "tga_zsr", "mmcoa"]


def trained(fastmat: Fastmat, out: Path, data: str, defence: str, *more: str) -> dict[str, torch.Tensor]:
    code, _, error = fastmat("train", *RUN, f"data={data}", f"defence={defence}", *more, "--out", out)
    assert code == 0, error
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["terms"] and None not in line["terms"].values() and line["skipped"] == 0 for line in lines)
    return load_file(out / "model.safetensors")


def towers_moved(weights: dict[str, torch.Tensor]) -> set[str]:
    """The towers with a weight that is not the start's."""
    start = tiny_clip().state_dict()
    assert weights.keys() == start.keys()
    return {
        key.split("_")[0] for key in start if key != "log_logit_scale" and not torch.equal(start[key], weights[key])
    }


@pytest.mark.parametrize("name", [name for name in DEFENCES if name != "tecoa"])
def test_every_defence_trains_on_captions(fastmat: Fastmat, mlm_folder: Path, tmp_path: Path, name: str) -> None:
    weights = trained(
        fastmat, tmp_path / "run", CAPTIONS, f"{{name: {name}{QUICK.get(name, '')}}}", f"mlm={mlm_folder}"
    )
    both = name in ("finetune", "tecoa_itr", "mat", "mmcoa")
    assert towers_moved(weights) == ({"image", "text"} if both else {"image"})


@pytest.mark.parametrize("name", ON_CLASSES)
def test_every_defence_with_that_form_trains_on_classes(
    fastmat: Fastmat, mlm_folder: Path, tmp_path: Path, name: str
) -> None:
    form = {"tecoa": "", "mmcoa": ", against: classes, trains: [image], steps: 2"}.get(name, ", against: classes")
    weights = trained(fastmat, tmp_path / "run", CLASSES, f"{{name: {name}{form}}}", f"mlm={mlm_folder}")
    assert towers_moved(weights) == {"image"}


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_choices_of_a_method_train(
    fastmat: Fastmat, mlm_folder: Path, tmp_path: Path, name: str, arguments: str
) -> None:
    trained(fastmat, tmp_path / "run", CAPTIONS, f"{{name: {name}, {arguments}}}", f"mlm={mlm_folder}")


@pytest.mark.parametrize(("trains", "targets"), [("[image, text]", "[linear1, blocks.0]"), ("[image]", "[blocks.0]")])
def test_adapters_train_and_are_merged(fastmat: Fastmat, tmp_path: Path, trains: str, targets: str) -> None:
    pytest.importorskip("peft")
    defence = f"{{name: tecoa_itr, steps: 1, trains: {trains}}}"
    weights = trained(fastmat, tmp_path / "run", CAPTIONS, defence, f"adapters={{targets: {targets}, rank: 2}}")
    start = tiny_clip().state_dict()
    moved = {key for key in start if not torch.equal(start[key], weights[key])}
    expected = {"image_tower.blocks.0.weight"}
    if "text" in trains:
        expected.add("text_tower.layers.layers.0.linear1.weight")
    assert moved == expected
    for key in moved:
        assert int(torch.linalg.matrix_rank((weights[key] - start[key]).flatten(1), rtol=1e-3)) <= 2


def test_a_teacher_of_another_width_is_one_sentence(fastmat: Fastmat, tmp_path: Path) -> None:
    teacher = "teacher={name: small, vocabulary: null, embed_dim: 24}"
    words = ["train", *RUN, f"data={CAPTIONS}", teacher, "--out", tmp_path / "run"]
    for defence in ("fare", "pmg_aft", "tga_zsr", "{name: sim_clip, quirks: {frozen_siamese: true}}"):
        code, _, error = fastmat(*words, f"defence={defence}")
        assert code == 2
        assert "the teacher embeds in 24 dimensions and the model in 16" in error
        assert len(error.strip().splitlines()) == 1


def test_classes_need_labels(fastmat: Fastmat, tmp_path: Path) -> None:
    for defence in ("tecoa", "{name: pmg_aft, against: classes}"):
        code, _, error = fastmat("train", *RUN, f"data={CAPTIONS}", f"defence={defence}", "--out", tmp_path / "run")
        assert code == 2
        assert "the captions of this set are no class labels" in error


def test_a_tower_that_no_term_reaches_stays_and_is_saved(fastmat: Fastmat, tmp_path: Path) -> None:
    """Distances of images alone: the text tower has no gradient, so AdamW has no moments of it."""
    defence = "{name: mat, text_search: embedding_space, pairs: {}, distances: {image-adv-clean: 1}}"
    weights = trained(fastmat, tmp_path / "run", CAPTIONS, defence)
    assert towers_moved(weights) == {"image"}
    moments = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    untouched = [value for key, value in moments.items() if "/text_" in key]
    assert untouched and not any(value.any() for value in untouched)
