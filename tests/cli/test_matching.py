"""A fusion model is hardened on the built-in set from the command line, stops, and goes on."""

import json
from pathlib import Path

import pytest
import torch
from cli.conftest import Fastmat
from models.test_blip import PIECES, official, reference
from safetensors.torch import load_file

from fastmat.models.tiny_fusion import tiny_blip
from fastmat.models.weights import save_weights

RUN = ["model=tiny_blip", "data={name: digits, split: val}", "limit=24", "batch_size=8", "threat.eps=8/255"]
MATCHING = "matching={queue: 16, itm: 0.5, ramp_steps: 2}"
ATTACKED = "defence={name: tecoa_itr, steps: 1, objective: itc_itm}"


def test_trains_and_goes_on(fastmat: Fastmat, tmp_path: Path) -> None:
    told = [*RUN, ATTACKED, MATCHING, "train={steps: 2, lr: 0.01, log_every: 1}"]
    code, _, error = fastmat("train", *told, "--out", tmp_path / "run")
    assert code == 0, error
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [set(line["terms"]) for line in lines] == [{"contrastive", "matching"}] * 2
    weights, start = load_file(tmp_path / "run/model.safetensors"), tiny_blip().state_dict()
    assert weights.keys() == start.keys()
    assert not weights["itm_head.weight"].equal(start["itm_head.weight"])
    memory = load_file(tmp_path / "run/checkpoints/step-00000002/memory.safetensors")
    assert int(memory["_extra_state"]) == 2 and (memory["images.group"] >= 0).all()
    code, _, error = fastmat("train", *told, "matching.queue=24", "--out", tmp_path / "run", "--resume")
    assert code != 0 and "matching.queue was 16, is now 24" in error


def test_refusals(fastmat: Fastmat, tmp_path: Path) -> None:
    train = "train={steps: 1}"
    for changed, said in (
        (["model=tiny", "defence=finetune", MATCHING], "matching: DualEncoder does not fuse images with texts"),
        (["defence=fare", MATCHING], "matching: FARE contrasts no images with texts"),
        (["defence=finetune", "matching={queue: 12}"], "multiple of the global batch of 8 images, got 12; take 8"),
        (["defence=finetune", "matching={queues: 12}"], "unknown key 'queues'"),
        (
            ["defence={name: mat, text_search: embedding_space, order: independent}", "matching={queue: 16}"],
            "this model embeds a text anew to match it: take word_substitution, or set itm: 0",
        ),
    ):
        code, _, error = fastmat("train", *RUN, *changed, train, "--out", tmp_path / "run")
        assert code == 2 and said in error, error
    # The four renderings of one description are one image to a caption.
    same = ["data={name: digits, split: train}", "limit=4", "batch_size=4", "defence=finetune", "matching={queue: 4}"]
    code, _, error = fastmat("train", *RUN, *same, train, "--out", tmp_path / "run")
    assert code == 2 and "all that it may be sought among belongs to one image; raise batch_size" in error, error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "eval"])
def test_checkpoints_of_other_models(fastmat: Fastmat, command: str, tmp_path: Path) -> None:
    """The layouts of BLIP and ALBEF mistaken for each other, no tokenizer, and weights at another resolution."""
    vocabulary, file = tmp_path / "vocab.txt", tmp_path / "blip.pth"
    vocabulary.write_text("\n".join(PIECES) + "\n")
    torch.save({"model": official(reference())}, file)
    late = {key: value for key, value in official(reference()).items() if ".layer.0.crossattention" not in key}
    torch.save({"model": late}, tmp_path / "albef.pth")
    save_weights(tiny_blip(image_size=48), tmp_path / "tiny.safetensors")
    heads = "image_heads: 2, text_heads: 2, context_length: 32"
    for model, said in (
        (f"{{name: albef, checkpoint: {file}, vocabulary: {vocabulary}, {heads}}}", "blip.pth is no ALBEF checkpoint"),
        (
            f"{{name: blip, checkpoint: {tmp_path / 'albef.pth'}, vocabulary: {vocabulary}, {heads}}}",
            "albef.pth is no BLIP checkpoint",
        ),
        (f"{{name: blip, checkpoint: {file}, vocabulary: {tmp_path / 'gone'}, {heads}}}", "no BERT tokenizer in"),
        (f"{{name: tiny_blip, weights: {tmp_path / 'tiny.safetensors'}}}", "image_tower.pos_embed"),
    ):
        own = [f"victims.v.model={model}"]
        if command == "train":
            own = [f"model={model}", "defence=finetune", MATCHING, "train={steps: 1}"]
        code, _, error = fastmat(command, "data={name: digits, split: val}", "limit=4", *own, "--out", tmp_path / "run")
        assert code == 2 and said in error, error
        assert len(error.splitlines()) == 1 and not (tmp_path / "run").exists()
