"""A fusion model is hardened on the built-in set from the command line, stops, and goes on."""

import json
from pathlib import Path

from cli.conftest import Fastmat
from safetensors.torch import load_file

from fastmat.models.tiny_fusion import tiny_blip

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
    ):
        code, _, error = fastmat("train", *RUN, *changed, train, "--out", tmp_path / "run")
        assert code != 0 and said in error, error
