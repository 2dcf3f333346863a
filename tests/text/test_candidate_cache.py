"""Candidates on disk: the same as computed ones, whoever wrote them and however writing ended."""

import inspect
import json
import logging
import multiprocessing
import os
import pickle
import re
from errno import ENOSPC
from functools import cache
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from golden import golden
from golden_models import golden_bert, golden_clip, golden_mlm
from tiny_mlm import VOCABULARY, tiny_candidates, tiny_captions, tiny_mlm, tiny_parts
from transformers import BertTokenizerFast

from fastmat.attacks.word_substitution import WordSubstitution
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.text import candidate_cache, candidates, masked
from fastmat.text.candidate_cache import QUIRKS, CandidateCache
from fastmat.text.candidates import CandidateSource, find_candidates
from fastmat.text.masked import MaskedCandidates
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.text.words import attackable, split

TEXTS = [*dict.fromkeys(tiny_captions(40, seed=2)), "", "the", "狗 在 dog", "🐕 dog \x00 cat\n", "dog " * 70]
SETTINGS = {"top_k": 10, "threshold": 1.5, "quirks": Quirks(), "max_length": 64}


@cache
def language_model() -> MaskedLanguageModel:
    return tiny_mlm()


def ask(source: CandidateSource, texts: list[str] = TEXTS, *, mlm: MaskedLanguageModel | None = None, **changes):
    """What a search over words asks its source."""
    settings = {**SETTINGS, **changes}
    mlm = mlm or language_model()
    captions = [split(text, mlm) for text in texts]
    exact = settings["quirks"].case_sensitive_filters
    wanted = [attackable(c, max_length=settings["max_length"], case_sensitive=exact) for c in captions]
    return source(mlm, captions, wanted, **settings)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.jsonl"))


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder that holds TEXTS, in one segment."""
    ask(CandidateCache(folder=tmp_path))
    return tmp_path


@pytest.mark.parametrize("quirks", [Quirks(), Quirks.official()], ids=["correct", "official"])
def test_cold_and_warm_equal_none(tmp_path: Path, quirks: Quirks, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(find_candidates, quirks=quirks)
    assert sum(map(len, expected)) > 100
    cold = CandidateCache(folder=tmp_path)
    assert ask(cold, quirks=quirks) == expected
    assert (cold.hits, cold.misses) == (0, len(TEXTS))
    monkeypatch.setattr(candidate_cache, "find_candidates", None)
    warm = CandidateCache(folder=tmp_path)
    for source in (warm, cold):
        assert ask(source, quirks=quirks) == expected
    assert (warm.hits, warm.misses) == (cold.hits, 0) == (len(TEXTS), 0)
    assert ask(warm, [], quirks=quirks) == []


def test_part_warm_and_duplicates(tmp_path: Path) -> None:
    cache = CandidateCache(folder=tmp_path)
    ask(cache, TEXTS[::2])
    texts = TEXTS[::-1] + TEXTS
    assert ask(cache, texts) == ask(find_candidates, texts)
    assert cache.misses == len(TEXTS)
    assert cache.misses + cache.hits == len(TEXTS[::2]) + len(texts)


def test_an_answer_belongs_to_the_caller(full: Path) -> None:
    cache = CandidateCache(folder=full)
    ask(cache, ["red dog", "red dog"])[0].clear()
    assert ask(cache, ["red dog"]) == ask(find_candidates, ["red dog"]) != [{}]


def attack(texts: list[str], guide: torch.Tensor, source: CandidateSource, quirks: Quirks) -> tuple[str, ...]:
    search = WordSubstitution(max_words=2, quirks=quirks, candidates=source)
    model = tiny_clip(seed=3).eval().requires_grad_(False)
    return search.search(model, search.plan(model, texts), guide)


@pytest.mark.parametrize("quirks", [Quirks(), Quirks.official(text_max_length=14)], ids=["correct", "official"])
def test_attacked_texts_are_the_same(tmp_path: Path, quirks: Quirks) -> None:
    texts = tiny_captions(30, seed=5)
    guide = torch.nn.functional.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = attack(texts, guide, tiny_candidates(threshold=1.5), quirks)
    assert sum(a != b for a, b in zip(texts, expected, strict=True)) > 10
    for _ in ("cold", "warm"):
        source = MaskedCandidates(mlm=tiny_mlm(), threshold=1.5, candidate_cache=tmp_path)
        assert attack(texts, guide, source, quirks) == expected


@pytest.mark.parametrize(
    "name",
    [
        "nosep.clip.L77.sga.official.n1",
        "sep.clip.L77.kl.fixed.n2",
        "nosep.bert.L30.sga.fixed.n2",
        "nosep.bert.L12.kl.cls.official.n2",
    ],
)
def test_recorded_texts(name: str, tmp_path: Path) -> None:
    recorded, tensors = golden("bert_attack")
    run = recorded["runs"][name]
    clip, sga = run["encoder"] == "clip", run["method"] == "sga"
    quirks = Quirks.official(round_trip=clip, text_max_length=run["max_length"]).but(
        append_sep=run["tokenizer"] == "sep", candidate_row_offset={"official": 0, "fixed": 1}[run["index"]]
    )
    model = golden_clip() if clip else golden_bert(append_sep=quirks.append_sep)
    guide = tensors[f"guide_image_feat.{run['encoder']}"] if sga else None
    representation = "features" if sga else "embeds" if clip else "cls" if run["cls"] else "tokens"
    sources = [MaskedCandidates(mlm=golden_mlm(), candidate_cache=folder) for folder in (None, tmp_path, tmp_path)]
    for source in sources:
        search = WordSubstitution(
            max_words=run["num_perturbation"],
            choice="cosine" if sga else "kl",
            importance=representation,
            compare=representation,
            quirks=quirks,
            candidates=source,
        )
        assert list(search.search(model, search.plan(model, recorded["texts"]), guide)) == run["adversarial"]
    assert [source.cache and source.cache.misses > 0 for source in sources] == [None, True, False]


def test_fill_is_what_a_search_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked, "CAPTIONS_PER_WRITE", 7)
    for quirks in (Quirks(), Quirks.official(text_max_length=14), Quirks.official(text_max_length=500)):
        cold, warm = (MaskedCandidates(mlm=tiny_mlm(), threshold=1.5, candidate_cache=tmp_path) for _ in range(2))
        assert cold.fill(TEXTS + TEXTS, quirks=quirks) == len(TEXTS)
        assert cold.fill(TEXTS, quirks=quirks) == 0
        WordSubstitution(candidates=warm, quirks=quirks).plan(tiny_clip().eval(), TEXTS[:-2])
        assert warm.cache is not None
        assert (warm.cache.hits, warm.cache.misses) == (len(TEXTS[:-2]), 0)


def test_misses_are_shown_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastmat")
    cache = CandidateCache(folder=tmp_path)
    ask(cache, ["red dog", "blue cat"])
    ask(cache, ["red dog", "green hat", "red dog"])
    ask(cache, ["red dog"])
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(", the others")[0] for line in lines] == [
        "candidates: 2 of 2 captions computed",
        "candidates: 1 of 3 captions computed",
    ]
    assert "so far 3 computed, 2 found" in lines[1]


CHANGES = [
    {"top_k": 9},
    {"threshold": 1.6},
    {"max_length": 63},
    {"quirks": Quirks(candidate_row_offset=0)},
    {"quirks": Quirks(append_sep=False)},
    {"quirks": Quirks(blanks_in_candidates=True)},
    {"quirks": Quirks(case_sensitive_filters=True)},
    {"mlm": tiny_mlm(seed=1)},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change.items()))[0])
def test_other_settings_are_other_candidates(full: Path, change: dict) -> None:
    cache = CandidateCache(folder=full)
    assert ask(cache, **change) == ask(find_candidates, **change)
    assert cache.hits == 0
    assert len(segments(full)) == 2


def test_quirks_that_change_no_candidates_share_them(full: Path) -> None:
    cache = CandidateCache(folder=full)
    ask(cache, quirks=Quirks(antialias=False, round_trip=True, text_max_length=64, clamp_start=False))
    assert cache.misses == 0


def test_every_quirk_that_candidates_read_is_in_the_key() -> None:
    read = set(re.findall(r"quirks\.(\w+)", inspect.getsource(candidates) + inspect.getsource(masked)))
    assert read == {*QUIRKS, "text_max_length"}  # this one is there as max_length


def test_another_tokenizer_with_the_same_vocabulary(full: Path) -> None:
    model, _ = tiny_parts()
    tokenizer = BertTokenizerFast(vocab={piece: i for i, piece in enumerate(VOCABULARY)}, do_lower_case=False)
    cased = MaskedLanguageModel(model=model, tokenizer=tokenizer, name="cased")
    assert cased.fingerprint == tiny_mlm().fingerprint
    cache = CandidateCache(folder=full)
    texts = ["red Dog runs", "red dog runs"]
    ask(cache, texts)
    assert ask(cache, texts, mlm=cased) == ask(find_candidates, texts, mlm=cased)
    assert cache.misses == 3  # "red dog runs" has the same pieces for both


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", 4), ("hidden_act", "relu")])
def test_weights_read_by_another_architecture(full: Path, name: str, value: object) -> None:
    mlm = tiny_mlm()
    setattr(mlm.model.config, name, value)
    cache = CandidateCache(folder=full)
    ask(cache, mlm=mlm)
    assert cache.hits == 0


def test_half_precision_has_its_own(full: Path) -> None:
    cache = CandidateCache(folder=full)
    with torch.autocast("cpu", torch.bfloat16):
        assert ask(cache) == ask(find_candidates)
    assert cache.hits == 0
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        ask(cache)
    finally:
        torch.set_float32_matmul_precision(before)
    assert cache.hits == 0


def test_manifest_says_what_candidates_were_computed_with(full: Path) -> None:
    (path,) = full.glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["mlm"] == tiny_mlm().fingerprint
    assert (manifest["top_k"], manifest["threshold"], manifest["max_length"]) == (10, 1.5, 64)
    assert manifest["quirks"] == {name: getattr(Quirks(), name) for name in QUIRKS}


def test_every_line_is_json(full: Path) -> None:
    (path,) = segments(full)
    header, *records = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert header["mlm"] == tiny_mlm().fingerprint
    assert len(records) == len({key for key, _, _ in records}) == len(TEXTS)


def test_cut_anywhere(full: Path) -> None:
    (path,) = segments(full)
    content = path.read_bytes()
    expected = ask(find_candidates)
    lines = content.splitlines(keepends=True)
    header, last = len(lines[0]), len(content) - len(lines[-1]) - len(lines[-2])
    for size in [0, 1, header - 1, header, header + 1, *range(last, len(content), 97), len(content) - 1, len(content)]:
        for other in segments(full):
            other.unlink()
        path.write_bytes(content[:size])
        whole = max(content[:size].count(b"\n") - 1, 0)
        cache = CandidateCache(folder=full)
        assert ask(cache) == expected
        assert cache.misses == len(TEXTS) - whole
        assert path.stat().st_size == size  # what others wrote stays as it is
        again = CandidateCache(folder=full)
        assert ask(again) == expected
        assert again.misses == 0


def test_a_line_that_is_still_being_written_is_read_later(full: Path) -> None:
    (path,) = segments(full)
    content = path.read_bytes()
    half = content.rindex(b'["') + 20
    path.write_bytes(content[:half])
    reader = CandidateCache(folder=full)
    ask(reader, TEXTS[:3])
    with path.open("ab") as file:
        file.write(content[half:])
    assert ask(reader, TEXTS[-1:]) == ask(find_candidates, TEXTS[-1:])
    assert reader.misses == 0


def refused(folder: Path, what: str) -> None:
    with pytest.raises(UserError, match=what) as raised:
        ask(CandidateCache(folder=folder))
    assert len(str(raised.value).splitlines()) == 1
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("at", [0, 3, 36, 50, -10, -2, -1])
def test_damaged_records(full: Path, at: int) -> None:
    (path,) = segments(full)
    lines = path.read_bytes().splitlines(keepends=True)
    line = bytearray(next(line for line in lines[2:] if len(line) > 100))
    number = lines.index(line)
    line[at] ^= 1
    path.write_bytes(b"".join([*lines[:number], line, *lines[number + 1 :]]))
    refused(full, "damaged at byte .* delete it")
    path.unlink()
    assert ask(CandidateCache(folder=full)) == ask(find_candidates)


def test_damage_while_in_use(full: Path) -> None:
    cache = CandidateCache(folder=full)
    ask(cache)
    (path,) = segments(full)
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    path.write_bytes(content[:header] + content[header:].replace(b"0", b"1"))
    with pytest.raises(UserError, match="damaged"):
        ask(cache)
    path.unlink()
    with pytest.raises(UserError, match="removed while it was in use"):
        ask(cache)


def test_files_of_another_language_model(full: Path) -> None:
    ask(CandidateCache(folder=full), mlm=tiny_mlm(seed=1))
    mine, other = segments(full)
    if tiny_mlm().fingerprint.encode() not in mine.read_bytes():
        mine, other = other, mine
    strayed = mine.with_name(f"1{mine.name}")
    other.rename(strayed)
    refused(full, "another masked language model")
    strayed.unlink()
    (other.parent / "manifest.json").replace(mine.with_name("manifest.json"))
    refused(full, "another masked language model")


def test_files_of_other_settings(full: Path) -> None:
    (mine,) = segments(full)
    ask(CandidateCache(folder=full), top_k=9)
    (other,) = set(segments(full)) - {mine}
    strayed = mine.with_name("strayed.jsonl")
    other.rename(strayed)
    refused(full, "other settings")
    strayed.unlink()
    (other.parent / "manifest.json").replace(mine.with_name("manifest.json"))
    refused(full, "top_k")


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_strange_files_are_refused_and_never_unpickled(full: Path) -> None:
    (path,) = segments(full)
    harm = full / "harm"
    strange = path.with_name("strange.jsonl")
    for content in (pickle.dumps(Harmful(harm)) + b"\n", b"null\n", b"[1]\n", b"\xff\xfe\n", b"{}\n"):
        strange.write_bytes(content)
        refused(full, "no file of candidates: move it away")
    strange.unlink()
    for content in (pickle.dumps(Harmful(harm)), b"", b"[]"):
        path.with_name("manifest.json").write_bytes(content)
        refused(full, r"manifest.json is damaged: delete")
    assert not harm.exists()


def test_folder_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    refused(file, "is a file: give a directory")
    refused(file / "below", "cannot be used")


def test_full_disk_costs_the_store_and_not_the_run(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CandidateCache(folder=full)
    ask(cache, ["red hat"])
    (own,) = (path for path in segments(full) if path.read_bytes().count(b"\n") == 2)
    opened = Path.open

    def half(path: Path, mode: str = "r"):
        if mode == "ab":
            with opened(path, mode) as file:
                file.write(b'["0123')
            raise OSError(ENOSPC, "No space left on device")
        return opened(path, mode)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", half)
        with pytest.warns(UserWarning, match="candidates are not stored: .* \\(No space left on device\\)"):
            assert ask(cache, ["blue hat"]) == ask(find_candidates, ["blue hat"])
    assert own.read_bytes().endswith(b'["0123')
    ask(cache, ["blue hat"])
    assert own.read_bytes().endswith(b'["0123')
    after = CandidateCache(folder=full)
    assert ask(after, ["red hat", "blue hat"]) == ask(find_candidates, ["red hat", "blue hat"])
    assert after.misses == 0


def test_a_forked_child_writes_to_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CandidateCache(folder=tmp_path)
    ask(cache, ["red dog"])
    ask(cache, ["blue dog"])
    assert len(segments(tmp_path)) == 1
    monkeypatch.setattr(os, "getpid", lambda: 1)
    ask(cache, ["red cat"])
    assert len(segments(tmp_path)) == 2


def test_writers_see_each_other(tmp_path: Path) -> None:
    one, two = CandidateCache(folder=tmp_path), CandidateCache(folder=tmp_path)
    ask(one, TEXTS[:10])
    ask(two, TEXTS[:20])
    ask(one, TEXTS[5:20])
    assert (one.misses, two.misses) == (10, 10)


def write(folder: Path, name: str, seed: int, start: Barrier) -> None:
    """One caption after the other, once; "killed" goes on until it is."""
    torch.set_num_threads(1)
    source = MaskedCandidates(mlm=tiny_mlm(), threshold=1.5, candidate_cache=folder)
    start.wait()
    while seed >= 0:
        for text in (*tiny_captions(60, seed=seed), *tiny_captions(60, seed=99)):
            source.fill([text], quirks=Quirks())
        seed = seed + 1 if name == "killed" else -1


def test_two_processes_write_and_a_third_is_killed(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    start = processes.Barrier(3)
    running = {
        name: processes.Process(target=write, args=(tmp_path, name, seed, start))
        for name, seed in {"one": 10, "two": 11, "killed": 20}.items()
    }
    try:
        for process in running.values():
            process.start()
        for name in ("one", "two"):
            running[name].join(60)
            assert running[name].exitcode == 0
        assert running["killed"].is_alive()
    finally:
        for process in running.values():
            process.kill()
            process.join()
    (folder,) = tmp_path.iterdir()
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == 4
    assert all(re.fullmatch(r"manifest\.json|\d+-[0-9a-f]{12}\.jsonl", name) for name in left)
    (killed,) = folder.glob(f"{running['killed'].pid}-*")
    killed.write_bytes(killed.read_bytes()[:-3])
    cache = CandidateCache(folder=tmp_path)
    texts = [text for seed in (10, 11, 99) for text in tiny_captions(60, seed=seed)]
    assert ask(cache, texts) == ask(find_candidates, texts)
    assert cache.misses <= 1  # the one record that was cut, had nobody else written it
    for name in ("one", "two"):
        (segment,) = folder.glob(f"{running[name].pid}-*")
        lines = segment.read_bytes().splitlines(keepends=True)
        assert all(line.endswith(b"]\n") for line in lines[1:])
