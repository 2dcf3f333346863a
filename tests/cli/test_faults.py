"""Unusual captions, models that do not fit together, memory that runs out, kills: a right result or one sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_mlm import SPECIAL, tiny_mlm
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from fastmat import memory
from fastmat.attacks.sga import SGA
from fastmat.evaluation.results import read_examples, read_results
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.models.weights import save_weights
from fastmat.text.masked import MaskedCandidates
from fastmat.types import Batch, ThreatModel

Fastmat = Callable[..., tuple[int, str, str]]
ATTACK = "{name: sga, steps: 2, scales: [0.5]}"
LONG = " ".join(["a red dog runs in the park"] * 80)
ODD = [
    ["собака бежит по снегу", "dog бежит dog"],
    ["一只狗在雪地里奔跑", "狗 dog 狗"],
    ["كلب يركض في الثلج", "שלום dog"],
    ["🐕 a dog 👩‍👩‍👧 runs 🏳️‍🌈", "🐕🐕🐕"],
    [LONG, LONG + " dog"],
    ["a red dog runs", "a red dog runs"],
    ["a red dog runs", "e\u0301 caf\u00e9 \u00a0dog\u200b \u202edog"],
    ["!!! ... ---", "the a in"],
]


def write_set(folder: Path, captions: list[list[str]]) -> list[str]:
    """Overrides that name a new set with these captions."""
    folder.mkdir()
    rows = []
    generator = torch.Generator().manual_seed(1)
    for i, own in enumerate(captions):
        pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": own})
    (folder / "test.json").write_text(json.dumps(rows))
    data = {"name": "json", "title": "odd", "split": "test", "images": str(folder)}
    return [f"data={json.dumps({**data, 'annotations': str(folder / 'test.json')})}"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP with CLIP's own pieces, in open_clip's layout."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "resize_mode": "shortest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_weights(clip, folder / "open_clip_model.safetensors")
    return folder


def images_of(folder: Path) -> Tensor:
    return torch.cat([load_file(path)["images"] for path in sorted(folder.glob("images-*.safetensors"))])


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("victim", ["tiny", "clip"])
def test_any_script_emoji_500_words_and_duplicates(
    fastmat: Fastmat, settings: list[str], clip_folder: Path, tmp_path: Path, victim: str
) -> None:
    model = "tiny" if victim == "tiny" else f"{{name: open_clip, architecture: {clip_folder}}}"
    words = [*settings, *write_set(tmp_path / "data", ODD), "threat.eps=8/255"]
    run = [*words, f"model={model}", f"attack={ATTACK}"]
    assert len(LONG.split()) > 500
    code, _, error = fastmat("attack", *run, "--out", tmp_path / "set")
    assert code == 0, error
    lines = lines_of(tmp_path / "set")
    assert [line["source"] for line in lines] == [caption for own in ODD for caption in own]
    changed = [line["source"] for line in lines if line["words_changed"] == 1]
    assert "a red dog runs" in changed
    for line in lines:
        source, adversarial = str(line["source"]).split(" "), str(line["adversarial"]).split(" ")
        assert len(source) == len(adversarial)
        assert sum(a != b for a, b in zip(source, adversarial, strict=True)) == line["words_changed"]
    assert lines[10]["adversarial"] == lines[11]["adversarial"]  # the same caption twice of one image

    code, _, error = fastmat("attack", *run, "batch_size=1", "--out", tmp_path / "single")
    assert code == 0, error
    assert lines_of(tmp_path / "single") == lines

    judged = [*words, f"victims.plain.model={model}", "attacks={}", f"sets=[{tmp_path / 'set'}]", "resamples=10"]
    code, _, error = fastmat("eval", *judged, "examples=8", "--out", tmp_path / "eval")
    assert code == 0, error
    assert read_results(tmp_path / "eval").rows[-1].n_captions == 16
    shown = {example.caption_before for example in read_examples(tmp_path / "eval" / "examples.json").examples}
    assert {"собака бежит по снегу", "🐕 a dog 👩‍👩‍👧 runs 🏳️‍🌈"} <= shown
    assert "🏳️‍🌈" in (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    code, _, error = fastmat("export", tmp_path / "set", "--out", tmp_path / "png")
    assert code == 0, error


def test_half_a_surrogate_pair(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    """No file of text can hold it: data that does is refused. In memory the attack reads it as a question mark."""
    words = [*settings, *write_set(tmp_path / "data", [["a red dog runs"], ["a dog \ud83d"]])]
    runs = {
        "attack": ["model=tiny", f"attack={ATTACK}"],
        "eval": ["victims.plain.model=tiny", f"attacks.sga={ATTACK}"],
        "candidates": [],
    }
    for command, run in runs.items():
        common = [word for word in words if command != "candidates" or not word.startswith("batch_size")]
        code, _, error = fastmat(command, *common, *run, "--out", tmp_path / "out")
        assert (code, error.count("\n")) == (2, 1)
        assert "row 2: 'caption' 'a dog \\ud83d' holds half a surrogate pair" in error
        assert not (tmp_path / "out").exists()

    attack = SGA(threat=ThreatModel(eps=8 / 255), candidates=MaskedCandidates(mlm=tiny_mlm()), steps=1, scales=(0.5,))
    pair = Batch(
        images=torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        texts=("a dog\ud83d", "a dog?"),
        txt2img=torch.tensor([0, 0]),
        index=torch.arange(2),
        group=torch.arange(2),
    )
    result = attack(tiny_clip(), pair)
    assert result.words_changed.max() <= 1
    assert [text.replace("\ud83d", "?") for text in result.texts] == [result.texts[1]] * 2


def test_a_language_model_of_another_vocabulary(
    fastmat: Fastmat, settings: list[str], clip_folder: Path, tmp_path: Path
) -> None:
    """What it knows of a caption are letters, what it proposes is its own: the victim reads both with its pieces."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    foreign = ["собака", "снег", "狗", "雪", "zug", "über", "straße"]
    vocabulary = [*SPECIAL, *foreign, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(vocabulary)})
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    model = f"model={{name: open_clip, architecture: {clip_folder}}}"
    attack = "attack={name: sga, steps: 1, scales: [0.5], candidates: {name: masked, top_k: 40, threshold: -9}}"
    words = [*settings, model, f"mlm={tmp_path / 'mlm'}", attack]
    code, _, error = fastmat("attack", *words, "--out", tmp_path / "set")
    assert code == 0, error
    lines = lines_of(tmp_path / "set")
    substitutes = [
        b for line in lines for a, b in zip(str(line["source"]).split(" "), str(line["adversarial"]).split(" "),
                                            strict=True) if a != b
    ]  # fmt: skip
    assert len(substitutes) == sum(int(str(line["words_changed"])) for line in lines) > 0
    assert all(set(word) <= set("".join([*foreign, *letters])) for word in substitutes)


@pytest.mark.parametrize(("command", "layout"), [("attack", "hf_clip"), ("eval", "open_clip")])
def test_a_surrogate_without_text_tower(
    fastmat: Fastmat, settings: list[str], clip_folder: Path, tmp_path: Path, command: str, layout: str
) -> None:
    folder = tmp_path / "vision"
    if layout == "hf_clip":
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **size)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
        model = f"{{name: hf_clip, path: {folder}}}"
    else:
        folder.mkdir()
        (folder / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
        state = load_file(clip_folder / "open_clip_model.safetensors")
        torch.save(
            {key: state[key] for key in state if key.startswith("visual.")}, folder / "open_clip_pytorch_model.bin"
        )
        model = f"{{name: open_clip, architecture: {folder}}}"
    run = {
        "attack": [f"model={model}", f"attack={ATTACK}"],
        "eval": ["victims.plain.model=tiny", f"surrogates.vision={model}", f"attacks.sga={ATTACK}", "resamples=10"],
    }[command]
    code, _, error = fastmat(command, *settings, *run, "--out", tmp_path / "out")
    said = error.splitlines()[-1]
    assert code == 2
    assert said.startswith(f"fastmat: {'model' if command == 'attack' else 'surrogates.vision'}: ")
    assert str(folder) in said and len(said) < 500
    assert "it has no text tower" in said or "does not fit this model: 18 missing (logit_scale, text." in said


@pytest.mark.parametrize("attack", ["{name: pgd, steps: 2}", ATTACK, "{name: co_attack, steps: 2}"])
def test_memory_that_runs_out_halves_the_work_and_changes_nothing(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    words = [*settings, "model=tiny", f"attack={attack}", "threat.eps=8/255", "batch_size=6"]
    assert fastmat("attack", *words, "--out", tmp_path / "roomy")[0] == 0
    monkeypatch.setattr(memory, "free_caches", lambda: None)  # it collects garbage, which takes its time
    images, texts, failed = DualEncoder.encode_image, DualEncoder.encode_text, []

    def image(model: DualEncoder, x: Tensor) -> object:
        if len(x) > 2:
            failed.append("image")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images(model, x)

    def text(model: DualEncoder, tokens: object) -> object:
        if len(tokens.ids) > 5:  # type: ignore[attr-defined]
            failed.append("text")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return texts(model, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(DualEncoder, "encode_image", image)
    monkeypatch.setattr(DualEncoder, "encode_text", text)
    code, _, error = fastmat("attack", *words, "--out", tmp_path / "tight")
    assert code == 0, error
    assert {"image", "text"} <= set(failed)
    assert "warning: out of memory at" in error and "from now on" in error
    assert lines_of(tmp_path / "tight") == lines_of(tmp_path / "roomy")
    torch.testing.assert_close(images_of(tmp_path / "tight"), images_of(tmp_path / "roomy"), atol=1e-6, rtol=0)

    monkeypatch.setattr(DualEncoder, "encode_image", lambda model, x: image(model, x.repeat(3, 1, 1, 1)))
    code, _, error = fastmat("attack", *words, "--out", tmp_path / "none")
    assert code == 2
    assert "fastmat: memory does not hold the work on one image: " in error.splitlines()[-1]


@pytest.mark.parametrize("command", ["attack", "eval"])
def test_a_killed_run_resumes_to_identical_output(
    fastmat: Fastmat, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    class Killed(BaseException):
        """Nothing is tidied up for it."""

    words = [*settings, "threat.eps=8/255", "batch_size=2", f"candidate_cache={tmp_path / 'words'}"]
    if command == "attack":
        words += ["model=tiny", f"attack={ATTACK}", "shard_size=2"]
    else:
        words += ["victims.plain.model=tiny", f"attacks.sga={ATTACK}", "resamples=20", "examples=2", "keep_sets=true"]
    assert fastmat(command, *words, "candidate_cache=null", "--out", tmp_path / "whole")[0] == 0
    run, calls = SGA.run, []

    def dying(*values: object) -> object:
        done = run(*values)  # type: ignore[arg-type]
        calls.append(None)
        if len(calls) == 2:
            raise Killed  # its candidates are stored, its images are not
        return done

    monkeypatch.setattr(SGA, "run", dying)
    with pytest.raises(Killed):
        fastmat(command, *words, "--out", tmp_path / "parts")
    code, shown, error = fastmat(command, *words, "--out", tmp_path / "parts", "--resume")
    assert code == 0, error
    assert len(calls) == 2 + 2
    assert "candidates: 4 captions found, 4 computed" in shown
    if command == "attack":
        folders = [tmp_path / "whole", tmp_path / "parts"]
    else:
        folders = [next((tmp_path / out / "sets" / "plain").iterdir()) for out in ("whole", "parts")]
        assert folders[0].name == folders[1].name
        rows = [
            [row.model_dump(exclude={"seconds", "pairs_per_s"}) for row in read_results(tmp_path / out).rows]
            for out in ("whole", "parts")
        ]
        assert rows[0] == rows[1]
        examples = [(tmp_path / out / "examples.json").read_bytes() for out in ("whole", "parts")]
        assert examples[0] == examples[1]
    assert lines_of(folders[0]) == lines_of(folders[1])
    assert torch.equal(images_of(folders[0]), images_of(folders[1]))
