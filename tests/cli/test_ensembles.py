"""An ensemble in `fastmat eval`: its runs are cells, its row the worst rank of every query over them and the rest."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmat.attacks.pgd import PGD
from fastmat.build import Component
from fastmat.cli.ensembles import ranks_of_rows, split, warn_of_square
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.results import Row, read_results
from fastmat.evaluation.subset import draw_rows
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import ThreatModel

Fastmat = Callable[..., tuple[int, str, str]]
STRONGEST = (
    "attacks.strongest={name: strongest, objectives: [margin_i2t, cosine], include: [square], steps: 2, restarts: 1, "
    "rounds: 2, n_queries: 4}"
)
SGA = "attacks.sga={name: sga, steps: 2, scales: []}"
RUNS = ["strongest.margin_i2t", "strongest.cosine", "strongest.square"]


@pytest.fixture
def common(settings: list[str]) -> list[str]:
    return [*settings, "victims.tiny={model: tiny}", "resamples=20", "examples=0", "threat.eps=8/255"]


def attacked(folder: Path) -> dict[str, Row]:
    return {row.attack: row for row in read_results(folder).rows if row.attack != "none"}


def ranks(folder: Path, row: Row) -> dict[str, torch.Tensor]:
    return load_file(folder / "ranks" / f"{row.inputs}.safetensors")


def right_in_all(of: Sequence[torch.Tensor], k: int) -> float:
    return 100 * sum(all(rank < k for rank in query) for query in zip(*of, strict=True)) / len(of[0])


def test_a_query_survives_only_where_it_survives_every_attack(
    fastmat: Fastmat, common: list[str], tmp_path: Path
) -> None:
    code, shown, error = fastmat("eval", *common, STRONGEST, SGA, "--out", tmp_path / "eval")
    assert code == 0, error
    rows = attacked(tmp_path / "eval")
    assert list(rows) == [*RUNS, "sga", "strongest"]
    found = [ranks(tmp_path / "eval", rows[label]) for label in (*RUNS, "sga")]
    for way in ("tr", "ir"):
        for k in (1, 5):
            assert rows["strongest"].value(f"{way}@{k}") == pytest.approx(right_in_all([r[way] for r in found], k))
    assert rows["strongest"].tr_1 <= min(rows[label].tr_1 for label in (*RUNS, "sga"))
    assert rows["strongest"].seconds == pytest.approx(sum(rows[label].seconds or 0 for label in RUNS))
    assert rows["strongest"].max_words_changed == 1 and rows["strongest"].white_box
    assert "strongest *" in shown


def test_on_some_images_others_count_with_the_same_queries(fastmat: Fastmat, common: list[str], tmp_path: Path) -> None:
    assert fastmat("eval", *common, STRONGEST, SGA, "subset.strongest=4", "--out", tmp_path / "eval")[0] == 0
    rows = attacked(tmp_path / "eval")
    row = rows["strongest"]
    assert (row.n_images, row.n_captions, row.gallery_images) == (4, 8, 6)
    assert all(rows[label].n_images == 4 for label in RUNS) and rows["sga"].n_images == 6
    chosen = torch.tensor(draw_rows(6, 4, seed=0))
    found = [ranks(tmp_path / "eval", rows[label]) for label in RUNS]
    sga = ranks(tmp_path / "eval", rows["sga"])
    assert row.tr_1 == pytest.approx(right_in_all([*(r["tr"] for r in found), sga["tr"][chosen]], 1))
    captions = torch.isin(sga["txt2img"], chosen)
    assert row.ir_1 == pytest.approx(right_in_all([*(r["ir"] for r in found), sga["ir"][captions]], 1))


def test_resumes_without_any_adversarial_set(
    fastmat: Fastmat, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eval"
    assert fastmat("eval", *common, STRONGEST, "--out", out)[0] == 0
    first = attacked(out)
    assert not (out / "sets").exists()
    monkeypatch.setattr("fastmat.attacks.alternating.Alternating.run", None)  # nothing may be attacked by it again
    assert fastmat("eval", *common, STRONGEST, "--out", out, "--resume")[0] == 0
    assert attacked(out) == first
    # One more attack is a new worst case, made of what is there.
    code, _, error = fastmat("eval", *common, STRONGEST, SGA, "--out", out, "--resume")
    assert code == 0, error
    later = attacked(out)
    assert {label: later[label] for label in RUNS} == {label: first[label] for label in RUNS}
    assert later["strongest"].inputs != first["strongest"].inputs
    assert later["strongest"].tr_1 <= min(first["strongest"].tr_1, later["sga"].tr_1)
    kept = {file.stem for file in (out / "ranks").iterdir()}
    assert kept == {row.inputs for label, row in later.items() if label != "strongest"}


def test_lost_ranks_are_made_again(fastmat: Fastmat, common: list[str], tmp_path: Path) -> None:
    out = tmp_path / "eval"
    assert fastmat("eval", *common, STRONGEST, "--out", out)[0] == 0
    first = attacked(out)
    (out / "ranks" / f"{first[RUNS[1]].inputs}.safetensors").unlink()
    assert fastmat("eval", *common, STRONGEST, SGA, "--out", out, "--resume")[0] == 0
    later = attacked(out)
    assert later[RUNS[1]].tr_5 == first[RUNS[1]].tr_5 and len(later) == 5


def test_other_radii_have_worst_cases_of_their_own(fastmat: Fastmat, common: list[str], tmp_path: Path) -> None:
    settings = [STRONGEST, "eps=[2/255]", "surrogates.other={name: tiny, seed: 3}"]
    assert fastmat("eval", *common, *settings, "--out", tmp_path / "eval")[0] == 0
    rows = [row for row in read_results(tmp_path / "eval").rows if row.attack == "strongest"]
    assert [round(row.threat.eps * 255) for row in rows] == [8, 2]
    assert all(row.surrogate == "other" and not row.white_box for row in rows)
    assert rows[0].max_distance > rows[1].max_distance


def test_what_a_gradient_hides_is_said_once(
    fastmat: Fastmat, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = DualEncoder.encode_image
    monkeypatch.setattr(DualEncoder, "encode_image", lambda self, x: encode(self, (x * 31).round() / 31))
    settings = [STRONGEST, "batch_size=2", "--out", tmp_path / "eval"]
    code, _, error = fastmat("eval", *common, *settings)
    assert code == 0
    assert error.count("fastmat: warning: strongest on tiny: the gradient is zero or not finite for 2 of 2") == 1
    code, _, error = fastmat("eval", *common, *settings, "--resume")
    assert code == 0 and "gradient" not in error


def test_queries_that_square_alone_wins_are_a_sign() -> None:
    def of(tr: list[int], ir: list[int]) -> Ranks:
        return Ranks(tr=torch.tensor(tr), ir=torch.tensor(ir), txt2img=torch.tensor([0, 1]))

    with pytest.warns(UserWarning, match=r"s on m: .* wins 2 queries"):
        warn_of_square("s on m", {"s.margin": of([0, 3], [0, 1]), "s.square": of([4, 0], [1, 2])})
    warn_of_square("s on m", {"s.margin": of([1, 3], [1, 1]), "s.square": of([4, 0], [1, 2])})
    warn_of_square("s on m", {"s.square": of([4, 0], [1, 2])})


def test_other_attacks_stay_as_they_are() -> None:
    variants = [(Component(name="pgd"), PGD(threat=ThreatModel()), None)]
    parts = split({"pgd": variants}, {"pgd": 3})
    assert (parts.attacks, parts.subset, parts.ensembles) == ({"pgd": variants}, {"pgd": 3}, {})


def test_ranks_of_some_images_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    txt2img = torch.repeat_interleave(torch.arange(9), torch.tensor([1, 2, 3] * 3))
    every = Ranks(
        tr=torch.randint(50, (9,), generator=generator),
        ir=torch.randint(50, (18,), generator=generator),
        txt2img=txt2img,
    )
    part = ranks_of_rows(every, range(20, 29), (21, 24, 28))
    assert part.tr.tolist() == [int(every.tr[i]) for i in (1, 4, 8)]
    assert part.ir.tolist() == [int(every.ir[t]) for t in range(18) if int(txt2img[t]) in (1, 4, 8)]
    assert part.txt2img.tolist() == [0, 0, 1, 1, 2, 2, 2]
