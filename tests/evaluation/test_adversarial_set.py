import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.evaluation.adversarial_set import AdversarialSet, AdversarialSetWriter
from fastmat.evaluation.evaluate import Attacked, clean_ranks, encode_gallery, evaluate, gallery_context, run_attack
from fastmat.evaluation.manifest import Manifest, config_fingerprint, sha256
from fastmat.evaluation.results import Setting, Threat
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import weights_hash
from fastmat.types import Batch

Split = Callable[[int], list[Batch]]
IDS = tuple(f"photo {i}.jpg" for i in range(11))
CONFIG = {"steps": 3, "nested": {"a": [1, 2]}}


@pytest.fixture
def plan(model: DualEncoder) -> Manifest:
    return Manifest(
        image_transform=model.image_transform,
        model=weights_hash(model),
        data=sha256(b"data"),
        config_sha256=config_fingerprint(CONFIG),
        config=CONFIG,
        surrogate="tiny",
        attack="pgd",
        threat=Threat(eps=8 / 255, max_words=1),
        dataset="d",
        split="test",
        seed=0,
        n_images=11,
    )


@pytest.fixture
def attacked(model: DualEncoder, split: Split, pgd: PGD) -> list[Attacked]:
    batches = split(2)
    made = list(run_attack(model, pgd, batches, gallery_context(encode_gallery(model, batches))))
    object.__setattr__(made[0].pairs, "texts", ('say "übermäßig"\u2028\r\n', *made[0].pairs.texts[1:]))
    return made


def write(folder: Path, plan: Manifest, attacked: list[Attacked], *, stop: int | None = None) -> None:
    with AdversarialSetWriter(folder, plan=plan, ids=IDS, shard_images=4) as writer:
        for part in attacked[:stop]:
            if int(part.pairs.index[0]) >= writer.n_done:
                writer.add(part)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_round_trip(tmp_path: Path, plan: Manifest, attacked: list[Attacked], data: Batch) -> None:
    write(tmp_path / "set", plan, attacked)
    stored = AdversarialSet(tmp_path / "set", data=plan.data)
    assert [shard.rows for shard in stored.manifest.shards] == [4, 4, 3] and len(stored) == 3
    for _ in range(2):  # as often as wanted
        shards = list(stored)
        assert torch.equal(
            torch.cat([s.pairs.images for s in shards]), torch.cat([part.pairs.images for part in attacked])
        )
        assert sum((s.pairs.texts for s in shards), ()) == sum((part.pairs.texts for part in attacked), ())
        assert sum((s.sources for s in shards), ()) == data.texts
        assert torch.equal(torch.cat([s.pairs.index[s.pairs.txt2img] for s in shards]), data.txt2img)
        assert torch.equal(torch.cat([s.pairs.group for s in shards]), data.group)
        assert torch.equal(torch.cat([s.distance for s in shards]), torch.cat([part.distance for part in attacked]))
        assert sum(s.seconds for s in shards) == pytest.approx(sum(part.seconds for part in attacked))
    stored.check_budget([data])


def test_files_are_as_documented(tmp_path: Path, plan: Manifest, attacked: list[Attacked], data: Batch) -> None:
    write(tmp_path, plan, attacked)
    assert sorted(contents(tmp_path)) == [
        *(f"images-0000{i}.safetensors" for i in range(3)),
        "manifest.json",
        "texts.jsonl",
    ]
    shard = load_file(tmp_path / "images-00001.safetensors")
    assert shard["images"].dtype == torch.float32 and shard["index"].tolist() == [4, 5, 6, 7]
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_bytes().splitlines()]
    assert [line["source"] for line in lines] == list(data.texts)
    assert [line["image"] for line in lines] == [IDS[i] for i in data.txt2img.tolist()]
    own = [0] * 11
    for line in lines:
        assert line["caption"] == own[line["index"]]
        own[line["index"]] += 1
    assert lines[0]["adversarial"] == 'say "übermäßig"\u2028\r\n'


def test_stored_data_gives_the_row_of_fresh_data(
    tmp_path: Path, plan: Manifest, attacked: list[Attacked], model: DualEncoder, data: Batch
) -> None:
    write(tmp_path, plan, attacked)
    setting = Setting(surrogate="a", victim="a", defence="none", dataset="d", split="test", seed=0)
    clean = clean_ranks(model, [data])
    fresh = evaluate(model, attacked, clean=clean, setting=setting, resamples=20)
    stored = evaluate(model, AdversarialSet(tmp_path), clean=clean, setting=setting, resamples=20)
    different = {"seconds", "pairs_per_s"}
    assert stored.model_dump(exclude=different) == fresh.model_dump(exclude=different)
    assert stored.seconds == pytest.approx(fresh.seconds)


@pytest.mark.parametrize("point", ["images", "texts", "manifest"])
def test_resumes_wherever_it_was_killed(
    tmp_path: Path, plan: Manifest, attacked: list[Attacked], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    write(tmp_path / "whole", plan, attacked)
    write(tmp_path / "set", plan, attacked, stop=2)  # the first shard
    import fastmat.evaluation.adversarial_set as module

    class Killed(BaseException):
        pass

    real_write, real_append = module.write_atomic, module.append_at

    def dying_write(path: Path, content: bytes) -> Path:
        if (path.suffix == ".safetensors") == (point == "images") and point != "texts":
            (path.parent / f".{path.name}.x").write_bytes(content[: len(content) // 2])
            raise Killed
        return real_write(path, content)

    def dying_append(path: Path, offset: int, content: bytes) -> None:
        real_append(path, offset, content[: len(content) // 2] if point == "texts" else content)
        if point == "texts":
            raise Killed

    monkeypatch.setattr(module, "write_atomic", dying_write)
    monkeypatch.setattr(module, "append_at", dying_append)
    with pytest.raises(Killed):
        write(tmp_path / "set", plan, attacked, stop=4)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"holds 4 of 11 images.*repeat"):
        AdversarialSet(tmp_path / "set")
    write(tmp_path / "set", plan, attacked)
    assert len(list(AdversarialSet(tmp_path / "set"))) == 3
    found = {name: content for name, content in contents(tmp_path / "set").items() if not name.startswith(".")}
    assert found == contents(tmp_path / "whole")


def test_missing_batches_are_cut_where_the_last_shard_ended(
    tmp_path: Path, plan: Manifest, attacked: list[Attacked], split: Split, data: Batch
) -> None:
    write(tmp_path, plan, attacked, stop=2)
    writer = AdversarialSetWriter(tmp_path, plan=plan, ids=IDS)
    for size in (1, 3, 4, 11):
        left = list(writer.missing(split(size)))
        assert torch.cat([batch.index for batch in left]).tolist() == list(range(4, 11))
        assert sum((batch.texts for batch in left), ()) == data.rows(4, 11).texts


def test_interrupt_saves_the_finished_batches(tmp_path: Path, plan: Manifest, attacked: list[Attacked]) -> None:
    with pytest.raises(KeyboardInterrupt), AdversarialSetWriter(tmp_path, plan=plan, ids=IDS) as writer:
        writer.add(attacked[0])
        raise KeyboardInterrupt
    writer = AdversarialSetWriter(tmp_path, plan=plan, ids=IDS)
    assert writer.n_done == 2


def test_other_errors_save_nothing_more(tmp_path: Path, plan: Manifest, attacked: list[Attacked]) -> None:
    with pytest.raises(OSError, match="disk"), AdversarialSetWriter(tmp_path, plan=plan, ids=IDS) as writer:
        writer.add(attacked[0])
        raise OSError("disk")
    assert AdversarialSetWriter(tmp_path, plan=plan, ids=IDS).n_done == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": "0" * 64}, "another model"),
        ({"data": "0" * 64}, "another data"),
        ({"config_sha256": "0" * 64}, "another configuration"),
    ],
)
def test_does_not_resume_another_run(
    tmp_path: Path, plan: Manifest, attacked: list[Attacked], changes: dict[str, str], word: str
) -> None:
    write(tmp_path, plan, attacked, stop=2)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"4 of 11 images made with {word}"):
        AdversarialSetWriter(tmp_path, plan=plan.model_copy(update=changes), ids=IDS)
    assert contents(tmp_path) == before


def test_never_overwrites(tmp_path: Path, plan: Manifest, attacked: list[Attacked]) -> None:
    write(tmp_path / "set", plan, attacked)
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match="finished adversarial set"):
        AdversarialSetWriter(tmp_path / "set", plan=plan, ids=IDS)
    assert contents(tmp_path / "set") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no adversarial set"):
        AdversarialSetWriter(tmp_path / "other", plan=plan, ids=IDS)
    with pytest.raises(UserError, match="is no adversarial set"):
        AdversarialSetWriter(tmp_path / "other" / "thesis.txt", plan=plan, ids=IDS)
    assert contents(tmp_path / "other") == {"thesis.txt": b"mine"}


def test_refuses_shortened_captions(tmp_path: Path, plan: Manifest, attacked: list[Attacked]) -> None:
    write(tmp_path, plan, attacked, stop=2)
    os.truncate(tmp_path / "texts.jsonl", 10)
    with pytest.raises(UserError, match=r"texts\.jsonl is shorter"):
        AdversarialSetWriter(tmp_path, plan=plan, ids=IDS)


def test_reader_says_what_is_wrong(tmp_path: Path, plan: Manifest, attacked: list[Attacked]) -> None:
    with pytest.raises(UserError, match=r"no adversarial set.*fastmat attack"):
        AdversarialSet(tmp_path / "nothing")
    write(tmp_path, plan, attacked)
    with pytest.raises(UserError, match=r"made of other data \(d, test\)"):
        AdversarialSet(tmp_path, data="1" * 64)
    manifest = (tmp_path / "manifest.json").read_bytes()
    for broken, message in (
        (manifest[:50], r"manifest\.json: Invalid JSON"),
        (b"\xff\xfe", r"manifest\.json"),
        (manifest.replace(b"n_images", b"n_image"), r"manifest\.json: key n_images?"),
        (manifest.replace(b"images-00000", b"../../secret"), r"key shards\.0\.file"),
    ):
        (tmp_path / "manifest.json").write_bytes(broken)
        with pytest.raises(UserError, match=message):
            AdversarialSet(tmp_path)
    (tmp_path / "manifest.json").write_bytes(manifest)
    (tmp_path / "images-00001.safetensors").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"images-00001\.safetensors is missing"):
        AdversarialSet(tmp_path)


@pytest.mark.parametrize("name", ["images-00001.safetensors", "texts.jsonl"])
def test_changed_bytes_are_found(tmp_path: Path, plan: Manifest, attacked: list[Attacked], name: str) -> None:
    write(tmp_path, plan, attacked)
    content = bytearray((tmp_path / name).read_bytes())
    content[-20] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} was changed or damaged"):
        list(AdversarialSet(tmp_path))


@pytest.mark.parametrize("fault", ["range", "dtype", "index", "key", "no safetensors", "caption"])
def test_forged_shards_are_refused(tmp_path: Path, plan: Manifest, attacked: list[Attacked], fault: str) -> None:
    write(tmp_path, plan, attacked)
    path, manifest = tmp_path / "images-00000.safetensors", json.loads((tmp_path / "manifest.json").read_text())
    tensors = load_file(path)
    if fault == "range":
        tensors["images"] = tensors["images"] * 255
    elif fault == "dtype":
        tensors["images"] = tensors["images"].half()
    elif fault == "index":
        tensors["index"] = tensors["index"] + 1
    elif fault == "key":
        del tensors["group"]
    save_file(tensors, path)
    if fault == "no safetensors":
        path.write_bytes(b"not a tensor file")
    if fault == "caption":
        lines = (tmp_path / "texts.jsonl").read_bytes()
        forged = lines.replace(b'"index": 0', b'"index": 9', 1)
        (tmp_path / "texts.jsonl").write_bytes(forged)
        manifest["shards"][0]["text_sha256"] = sha256(forged[: manifest["shards"][0]["text_bytes"]])
    manifest["shards"][0]["sha256"] = sha256(path.read_bytes())
    damage(tmp_path, **manifest)
    with pytest.raises(UserError, match="do not fit the format"):
        list(AdversarialSet(tmp_path))


def test_budget_is_measured_against_the_clean_images(
    tmp_path: Path, plan: Manifest, attacked: list[Attacked], data: Batch, split: Split
) -> None:
    write(tmp_path, plan, attacked)
    stored = AdversarialSet(tmp_path)
    stored.check_budget(split(3))
    found = torch.cat([part.pairs.images for part in stored])[6, 1, 2, 3]
    for excess in (0.2, 5e-6):
        moved = data.images.clone()
        moved[6, 1, 2, 3] = found + 8 / 255 + excess
        with pytest.raises(UserError, match=r"image 6 is 0\.\d+ from its clean one, the budget is 0\.031373 \(linf\)"):
            stored.check_budget([data.replace(images=moved)])
    with pytest.raises(UserError, match=r"image 10 .*no clean image"):
        stored.check_budget([data.rows(0, 10)])
    with pytest.raises(UserError, match=r"clean one of \(3, 16, 16\)"):
        stored.check_budget([data.replace(images=data.images[:, :, :16, :16])])


def test_fingerprints_tell_one_weight_and_one_setting_apart() -> None:
    assert weights_hash(tiny_clip(seed=0)) == weights_hash(tiny_clip(seed=0))
    other = tiny_clip(seed=0)
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-3
    assert weights_hash(other) != weights_hash(tiny_clip(seed=0))
    assert config_fingerprint({"a": 1, "b": 2}) == config_fingerprint({"b": 2, "a": 1})
    assert config_fingerprint({"a": 1}) != config_fingerprint({"a": 2})


CHILD = """
import sys
from pathlib import Path
import torch
from fastmat.evaluation.adversarial_set import AdversarialSetWriter
from fastmat.evaluation.evaluate import Attacked
from fastmat.evaluation.manifest import Manifest
from fastmat.types import Batch

plan = Manifest.model_validate_json(Path(sys.argv[2]).read_bytes())
ids = [str(i) for i in range(plan.n_images)]
with AdversarialSetWriter(Path(sys.argv[1]), plan=plan, ids=ids, shard_images=2) as writer:
    for i in range(writer.n_done, plan.n_images):
        pairs = Batch(
            images=torch.full((1, 3, 64, 64), i / plan.n_images),
            texts=(f"t{i}",),
            txt2img=torch.tensor([0]),
            index=torch.tensor([i]),
            group=torch.tensor([i]),
        )
        none = torch.zeros(1, dtype=torch.int64)
        writer.add(Attacked(pairs=pairs, sources=("s",), distance=none.float(), words_changed=none, seconds=0))
        print(i, flush=True)
"""


def test_survives_sigkill(tmp_path: Path, plan: Manifest) -> None:
    (tmp_path / "plan.json").write_text(plan.model_copy(update={"n_images": 120}).model_dump_json())
    command = [sys.executable, "-c", CHILD, str(tmp_path / "set"), str(tmp_path / "plan.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = Manifest.model_validate_json((tmp_path / "set" / "manifest.json").read_bytes()).n_done
    assert 18 <= done < 120
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
    assert int(output[0]) == done
    stored = AdversarialSet(tmp_path / "set")
    assert sum((part.pairs.texts for part in stored), ()) == tuple(f"t{i}" for i in range(120))
