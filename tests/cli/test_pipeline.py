"""`fastmat eval --pipeline`: experts, and an agent on a scripted endpoint, clean and attacked, on the built-in set."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoint import Reply, calls, relaying, says, serving, told
from tiny_generators import save_captioner
from two_processes import in_two_processes

from fastmat.attacks.pgd import PGD
from fastmat.evaluation.results import read_json
from fastmat.pipeline import endpoint
from fastmat.pipeline.results import Entry, PipelineExamples, PipelineResults
from fastmat.pipeline.retrieval import Retrieval

Fastmat = Callable[..., tuple[int, str, str]]
N = 6
KEY = "sk-not-to-be-seen"
PGD1 = "attacks.pgd={name: pgd, steps: 1}"
BASE = ["eval", "--pipeline", "data={name: digits, split: test}", f"limit={N}", "batch_size=4"]
BASE += ["threat.eps=16/255", "resamples=20", "examples=2"]
TAGGING = {"name": "tagging", "names": ["one", "two", "three"]}


def pipelines(captioner: Path | None = None, *, fusion: bool = True) -> dict[str, Any]:
    """Two sets of experts, whose models have other seeds."""

    def experts(seed: int) -> dict[str, Any]:
        made: dict[str, Any] = {
            "retrieval": {"expert": "retrieval", "model": {"name": "tiny", "seed": seed}},
            "tags": {"expert": TAGGING, "model": {"name": "tiny", "seed": seed}},
        }
        if fusion:
            albef = {"name": "tiny_albef", "seed": seed}
            made["where"] = {"expert": {"name": "grounding", "layer": 1}, "model": albef}
        if captioner is not None:
            model = {"name": "blip_captioner", "path": str(captioner), "prompt": "a", "beams": 1}
            made["caption"] = {"expert": "captioning", "model": model}
        return made

    return {"plain": {"experts": experts(0)}, "mat": {"experts": experts(1), "defence": "mat"}}


def small(**more: Any) -> list[str]:
    """One pipeline of a retrieval expert."""
    experts = {"retrieval": {"expert": "retrieval", "model": "tiny"}, **more}
    return [*BASE, f"pipelines={json.dumps({'plain': {'experts': experts}})}"]


def asking(url: str, **more: object) -> str:
    return f"endpoint={json.dumps({'url': url, 'model': 'scripted', 'retries': 0, **more})}"


def journal(out: Path) -> list[Entry]:
    return [Entry.model_validate_json(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def one_sentence(error: str) -> bool:
    """Bars of progress and the like aside, which nobody watches here."""
    return error.startswith("fastmat: ") and error.count("\n") == 1


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def test_experts_clean_and_attacked_before_and_after_hardening(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    captioner = save_captioner(tmp_path / "captioner")
    words = [*BASE, f"pipelines={json.dumps(pipelines(captioner))}", PGD1, "eps=[4/255]", "--out", out]
    code, shown, error = fastmat(*words)
    assert code == 0, error
    results = read_json(out / "results.json", PipelineResults)
    experts = ["retrieval", "tags", "where", "caption"]
    assert results.question is None
    assert [(row.victim, round(255 * row.threat.eps), row.expert) for row in results.rows] == [
        (victim, eps, expert) for victim in ("plain", "mat") for eps in (16, 4) for expert in experts
    ]
    entries = journal(out)
    # Two pipelines; clean and two radii. Both have one captioner, which is asked about clean pictures once.
    assert len(entries) == 2 * 3 * len(experts) * N - N
    for row in results.rows:
        assert row.surrogate == f"{row.victim}.retrieval" and row.defence == ("mat" if row.victim == "mat" else "none")
        assert row.white_box == (row.expert in ("retrieval", "tags")) and row.n_images == N
        assert ("fewer" in row.values) == (row.victim == "mat") and ("right" in row.values) == (
            row.expert == "retrieval"
        )
        assert 0 < row.max_distance <= row.threat.eps + 1e-6 and set(row.values) == set(row.ci)
        # The rate is that of the answers in the journal.
        before, after = (
            [entry.answer for entry in entries if entry.asked == f"{who}.{row.expert}" and of in entry.of]
            for who, of in (
                ("plain" if row.expert == "caption" else row.victim, "clean"),
                (row.victim, f"eps {row.threat.eps:.4g}"),
            )
        )
        changed = sum(a != b for a, b in zip(before, after, strict=True))
        assert row.values["changed"] == pytest.approx(100 * changed / N)
    assert any(row.values["changed"] > 0 for row in results.rows)
    examples = read_json(out / "examples.json", PipelineExamples).examples
    assert len(examples) == 2 * 2 * 2 and [said.expert for said in examples[0].said] == experts
    assert all(said.changed == (said.before != said.after) for example in examples for said in example.said)
    assert {entry.argument != "" for entry in entries if entry.asked.endswith("where")} == {True}
    page = (out / "report.html").read_text()
    assert "answers of plain change" in page and "With MAT, " in page and "plain.retrieval" in shown
    (out / "report.html").unlink()
    assert fastmat("report", out)[0] == 0
    assert (out / "report.html").read_text() == page
    assert not (out / "sets").exists()

    # The same again asks nothing, and attacks nothing.
    def stop(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(PGD, "run", stop)
    monkeypatch.setattr(Retrieval, "answer", stop)
    code, shown, error = fastmat(*words, "--resume")
    assert code == 0, error
    assert f"{len(entries)} answers of an earlier run were at hand" in shown
    assert read_json(out / "results.json", PipelineResults) == results
    assert (out / "report.html").read_text() == page
    assert len(journal(out)) == len(entries)


def test_an_agent_calls_the_experts(fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    out = tmp_path / "out"
    with serving(relaying("retrieval", "tags", "where")) as served:
        agent = asking(served.url, api_key_env="MY_KEY", question="What <b>stands</b> where?", images=4)
        words = [*BASE, f"pipelines={json.dumps(pipelines())}", PGD1, agent, "--out", out]
        code, _, error = fastmat(*words)
        assert code == 0, error
        # Two messages a picture; clean, clean again, attacked; two pipelines.
        assert len(served.requests) == 2 * 4 * 3 * 2
        assert {request["messages"][1]["content"] for request in served.requests} == {"What <b>stands</b> where?"}
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in served.headers)
        assert fastmat(*words, "--resume")[0] == 0
        assert len(served.requests) == 2 * 4 * 3 * 2
        # Another question is other answers.
        assert fastmat(*words, "endpoint.question=Why?", "endpoint.again=false", "--resume")[0] == 0
        assert len(served.requests) == 2 * 4 * (3 + 2) * 2
    results = read_json(out / "results.json", PipelineResults)
    assert results.question == "Why?" and "noise" not in results.rows[3].values
    agents = [row for row in results.rows if row.expert == "agent"]
    assert [row.victim for row in agents] == ["plain", "mat"] and all(row.n_images == 4 for row in agents)
    entries = journal(out)
    said = {(entry.asked, entry.of, entry.row): entry for entry in entries}
    for (asked, of, row), entry in said.items():
        if asked.endswith(".agent"):
            # What the agent says is what its experts said, of the same picture.
            of = of.removesuffix(", again")
            pipeline = asked.removesuffix(".agent")
            found = [call.answer for call in entry.calls]
            assert entry.answer == "; ".join(found) and len(found) == 3
            assert found[:2] == [said[f"{pipeline}.{expert}", of, row].answer for expert in ("retrieval", "tags")]
    page = (out / "report.html").read_text()
    assert "changed, clean again" in page
    for file in out.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()


def test_the_agent_repeats_itself_or_not(fastmat: Fastmat, tmp_path: Path) -> None:
    numbers = count()
    with serving(lambda _: says(f"answer {next(numbers)}")) as served:
        assert fastmat(*small(), PGD1, asking(served.url), "--out", tmp_path / "out")[0] == 0
    row = read_json(tmp_path / "out" / "results.json", PipelineResults).rows[-1]
    assert row.values["noise"] == row.values["changed"] == 100
    assert "changed, clean again" in (tmp_path / "out" / "report.html").read_text()


def test_malformed_calls_are_told_back_and_logged(fastmat: Fastmat, tmp_path: Path) -> None:
    def script(request: dict[str, Any]) -> dict[str, Any]:
        said = told(request)
        return calls(("paint", {}), ("retrieval", "{")) if not said else says(said[-1])

    with serving(script) as served:
        code, _, error = fastmat(*small(), PGD1, asking(served.url), "--out", tmp_path / "out")
    assert code == 0, error
    entry = journal(tmp_path / "out")[-1]
    assert [(call.tool, call.failed) for call in entry.calls] == [("paint", True), ("retrieval", True)]
    assert entry.answer == "error: the arguments are not a JSON object"


def test_an_agent_that_never_answers_is_counted(fastmat: Fastmat, tmp_path: Path) -> None:
    with serving(lambda _: calls(("retrieval", {}))) as served:
        words = [*small(), PGD1, asking(served.url, max_steps=2), "--out", tmp_path / "out"]
        code, _, error = fastmat(*words)
    assert code == 0, error
    row = read_json(tmp_path / "out" / "results.json", PipelineResults).rows[-1]
    assert (row.values["unanswered_clean"], row.values["unanswered"], row.values["changed"]) == (100, 100, 0)


def test_an_endpoint_that_dies_loses_nothing(fastmat: Fastmat, tmp_path: Path) -> None:
    out, alive = tmp_path / "out", iter([True] * 9)

    def script(request: dict[str, Any]) -> Reply | dict[str, Any]:
        return says("a digit") if next(alive, healthy) else Reply(b"overloaded", status=503)

    healthy = False
    with serving(script) as served:
        words = [*small(), PGD1, asking(served.url), "--out", out]
        code, shown, error = fastmat(*words)
        assert (code, shown) == (2, "") and one_sentence(error)
        assert "refuses with HTTP 503 (overloaded); try again later with --resume" in error
        assert sum(entry.asked == "plain.agent" for entry in journal(out)) == 9
        healthy = True
        before = len(served.requests)
        code, _, error = fastmat(*words, "--resume")
        assert code == 0, error
        assert len(served.requests) - before == 3 * N - 9
    assert [row.expert for row in read_json(out / "results.json", PipelineResults).rows] == ["retrieval", "agent"]


BROKEN: dict[str, tuple[Reply, dict[str, object], str]] = {
    "html": (Reply(b"<!doctype html><p>welcome"), {}, "answers with HTML, not with a chat completion in JSON"),
    "no json": (Reply(b"yes"), {}, "answers with text that is not JSON"),
    "silent": (Reply(b"{}", wait=0.5), {"timeout": 0.1, "retries": 1}, "nothing came within 0.1 s"),
    "refusing": (Reply(b'{"error": {"message": "who are you"}}', status=401), {}, "HTTP 401 (who are you)"),
    "cut": (Reply(b"{}", cut=True), {}, "does not answer (it broke off)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_endpoint_is_one_sentence_and_the_experts_go_on_without(
    fastmat: Fastmat, tmp_path: Path, kind: str
) -> None:
    reply, settings, said = BROKEN[kind]
    out = tmp_path / "out"
    with serving(lambda _: reply) as served:
        code, shown, error = fastmat(*small(), PGD1, asking(served.url, **settings), "--out", out)
    assert (code, shown) == (2, "") and one_sentence(error) and said in error
    kept = journal(out)
    assert [entry.asked for entry in kept] == ["plain.retrieval"] * N
    code, shown, error = fastmat(*small(), PGD1, "--out", out, "--resume")
    assert code == 0, error
    assert f"{N} answers of an earlier run were at hand" in shown
    assert journal(out)[:N] == kept


def test_ctrl_c_keeps_what_was_answered(fastmat: Fastmat, tmp_path: Path) -> None:
    out, numbers = tmp_path / "out", count()

    def script(request: dict[str, Any]) -> dict[str, Any]:
        if next(numbers) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return says("a digit")

    with serving(script) as served:
        words = [*small(), PGD1, asking(served.url), "--out", out]
        code, _, error = fastmat(*words)
        assert code == 130 and "answers.jsonl; the same command with --resume goes on" in error
        assert sum(entry.asked == "plain.agent" for entry in journal(out)) == 5
        assert fastmat(*words, "--resume")[0] == 0
    assert next(numbers) == 3 * N


def test_what_was_attacked_is_not_attacked_again(
    fastmat: Fastmat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    answer, asked = Retrieval.answer, count()

    def stop(self: Retrieval, *told: Any) -> list[str]:
        if next(asked) == 3:  # clean pictures take two batches
            raise KeyboardInterrupt
        return answer(self, *told)

    with monkeypatch.context() as patched:
        patched.setattr(Retrieval, "answer", stop)
        assert fastmat(*small(), PGD1, "--out", out)[0] == 130
    assert len(journal(out)) == N + 4
    monkeypatch.setattr(PGD, "run", None)
    assert fastmat(*small(), PGD1, "--out", out, "--resume")[0] == 0
    assert len(journal(out)) == 2 * N and not (out / "sets").exists()
    assert len(read_json(out / "examples.json", PipelineExamples).examples) == 2


def test_stored_sets_and_named_surrogates(fastmat: Fastmat, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    words = ["attack", "data={name: digits, split: test}", f"limit={N}", "model={name: tiny, image_size: 24}"]
    assert fastmat(*words, "attack={name: pgd, steps: 1}", "threat.eps=16/255", "--out", stored)[0] == 0
    words = [*BASE, f"pipelines={json.dumps(pipelines(fusion=False))}", "--out", tmp_path / "out"]
    words += [f"sets=[{stored}]", PGD1, "surrogates={other: {name: tiny, seed: 1}}"]
    code, _, error = fastmat(*words)
    assert code == 0, error
    rows = read_json(tmp_path / "out" / "results.json", PipelineResults).rows
    assert [(row.surrogate, row.victim, row.expert, row.white_box) for row in rows] == [
        ("other", "plain", "retrieval", False),
        ("other", "plain", "tags", False),
        ("other", "mat", "retrieval", True),
        ("other", "mat", "tags", True),
        ("tiny", "plain", "retrieval", False),
        ("tiny", "plain", "tags", False),
        ("tiny", "mat", "retrieval", False),
        ("tiny", "mat", "tags", False),
    ]
    assert all(("fewer" in row.values) == (row.victim == "mat") for row in rows)
    # Clean pictures of the stored set's resolution are asked about apart from those of the surrogate's.
    assert sum(entry.of == "clean" for entry in journal(tmp_path / "out")) == 2 * 2 * 2 * N
    page = (tmp_path / "out" / "report.html").read_text()
    assert "PGD on other, eps 16/255" in page and "PGD on tiny, eps 16/255" in page


def test_nothing_but_the_attack_changes_an_answer(fastmat: Fastmat, tmp_path: Path) -> None:
    """A surrogate of another resolution resizes the pictures; the clean ones are resized with them."""
    made = json.dumps({"plain": pipelines()["plain"]})
    words = [*BASE, f"pipelines={made}", PGD1, "surrogates={other: {name: tiny, image_size: 16}}", "threat.eps=0"]
    code, _, error = fastmat(*words, "--out", tmp_path / "out")
    assert code == 0, error
    rows = read_json(tmp_path / "out" / "results.json", PipelineResults).rows
    assert [row.values["changed"] for row in rows] == [0, 0, 0] and rows[0].max_distance == 0


def test_radii_that_move_nothing_are_not_repeated(fastmat: Fastmat, mlm_folder: Path, tmp_path: Path) -> None:
    attack = "attacks.words={name: bert_attack}"
    code, _, error = fastmat(*small(), attack, f"mlm={mlm_folder}", "eps=[4/255]", "--out", tmp_path / "out")
    assert code == 0, error
    (row,) = read_json(tmp_path / "out" / "results.json", PipelineResults).rows
    assert row.max_distance == row.values["changed"] == 0


@pytest.mark.distributed
def test_two_processes_attack_to_the_answers_of_one(fastmat: Fastmat, tmp_path: Path) -> None:
    with serving(relaying("retrieval")) as served:
        words = [*small(), PGD1, asking(served.url)]
        assert fastmat(*words, "--out", tmp_path / "one")[0] == 0
        ended = in_two_processes([*words, "--out", tmp_path / "two"])
    assert ended.returncode == 0, ended.stderr
    one, two = (read_json(tmp_path / name / "results.json", PipelineResults) for name in ("one", "two"))
    assert one.rows == two.rows and ended.stdout.count("report.html") == 1


def test_help_lists_keys_and_experts(fastmat: Fastmat) -> None:
    code, out, _ = fastmat("eval", "--help")
    assert code == 0
    text = " ".join(out.split())
    for line in (
        "--pipeline",
        "pipelines.LABEL.experts.LABEL.expert: one of retrieval, tagging, captioning, grounding (required)",
        "endpoint.api_key_env: str or null = null",
        "layer: int = 2",
    ):
        assert line in text
    assert "vlm:" not in text


def refused() -> Iterator[tuple[str, list[str], str]]:
    """name, words, and what is said."""
    two = pipelines(fusion=False)
    less = {**two, "mat": {"experts": {"tags": two["mat"]["experts"]["tags"]}}}
    more = {**two, "plain": less["mat"]}
    tags = {"expert": {"name": "tagging", "names": ["four", "five"]}, "model": "tiny"}
    other = {**two, "mat": {"experts": {**two["mat"]["experts"], "tags": tags}}}
    agent = "endpoint={url: 'http://127.0.0.1:9/v1', model: m}"

    def of(made: object) -> list[str]:
        return [*BASE, f"pipelines={json.dumps(made)}", PGD1]

    def expert(**given: object) -> list[str]:
        return of({"plain": {"experts": {"one": {"model": "tiny", **given}}}})

    yield "no pipelines", [*BASE, PGD1], "pipelines: this key is required"
    yield "empty", of({}), "pipelines: "
    yield "no experts", of({"plain": {"experts": {}}}), "pipelines.plain.experts: "
    yield "expert missing", of(less), "pipelines.mat.experts: 'retrieval' of plain is missing; give all pipelines"
    yield "expert too many", of(more), "pipelines.mat.experts: 'retrieval' is missing in plain"
    yield "expert set otherwise", of(other), "pipelines.mat.experts.tags.expert: is set otherwise than in plain"
    yield "no kind", expert(), "pipelines.plain.experts.one.expert: this key is required"
    yield "unknown expert", expert(expert="captions"), "unknown name 'captions'; did you mean 'captioning'?"
    yield "unknown model", expert(expert="retrieval", model="tinny"), "pipelines.plain.experts.one.model: unknown name"
    yield "unknown key", expert(expert={"name": "retrieval", "top": 3}), "unknown key 'top'"
    yield "unknown key of the run", [*small(), PGD1, "pipeline=3"], "unknown key 'pipeline'; did you mean 'pipelines'?"
    yield "tagging without names", expert(expert="tagging"), "pipelines.plain.experts.one: 'names' is missing"
    yield "captions by CLIP", expert(expert="captioning"), "pipelines.plain.experts.one: DualEncoder writes no captions"
    yield "grounding by CLIP", expert(expert="grounding"), "one: DualEncoder does not look at images with words"
    gone = {"name": "tiny", "weights": "gone.safetensors"}
    yield "weights", expert(expert="retrieval", model=gone), "one.model: weights file gone.safetensors does not exist"
    yield "nothing attacked", small(), "nothing is attacked: name attacks, or sets"
    yield "no set", [*small(), "sets=[gone]"], "gone is no adversarial set"
    yield (
        "agent's label",
        of({"p": {"experts": {"agent": {"expert": "retrieval", "model": "tiny"}}}}),
        "'agent' is what",
    )
    dotted = {"a.b": {"expert": "retrieval", "model": "tiny"}}
    yield "no tool's label", [*of({"p": {"experts": dotted}}), agent], "'a.b' is no name of a tool"
    yield "no url", [*small(), PGD1, "endpoint={model: m}"], "endpoint.url: this key is required"
    yield (
        "url",
        [*small(), PGD1, agent, "endpoint.url=localhost"],
        "endpoint: url must read like http://localhost:8000/v1",
    )
    yield "key", [*small(), PGD1, agent, "endpoint.api_key_env=NO_SUCH"], "environment variable NO_SUCH is not set"
    yield "steps", [*small(), PGD1, agent, "endpoint.max_steps=0"], "endpoint.max_steps: "
    yield "surrogate", [*small(), PGD1, "surrogates={s: tiny_albef_ve}"], "attacks.pgd on s: a model for entailment has"


CASES = {name: (words, said) for name, words, said in refused()}


@pytest.mark.parametrize("name", CASES)
def test_refusals(fastmat: Fastmat, tmp_path: Path, name: str) -> None:
    words, said = CASES[name]
    code, shown, error = fastmat(*words, "--out", tmp_path / "out")
    assert (code, shown) == (2, "") and one_sentence(error), error
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_dead_endpoint(fastmat: Fastmat, tmp_path: Path) -> None:
    code, _, error = fastmat(*small(), PGD1, asking("http://127.0.0.1:9/v1"), "--out", tmp_path / "out")
    assert code == 2 and one_sentence(error) and "127.0.0.1:9/v1/chat/completions does not answer" in error


def test_a_damaged_journal(fastmat: Fastmat, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fastmat(*small(), PGD1, "--out", out)[0] == 0
    (out / "answers.jsonl").write_text("hello\n")
    code, _, error = fastmat(*small(), PGD1, "--out", out, "--resume")
    assert code == 2 and one_sentence(error) and "answers.jsonl, line 1: no answer as fastmat writes it" in error
    assert fastmat(*small(), PGD1, "--out", out)[0] == 2  # not empty
    assert fastmat(*small(), PGD1, "--out", tmp_path / "new", "--resume")[0] == 2  # nothing to go on with
