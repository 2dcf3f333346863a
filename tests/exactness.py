"""Every caption of a set: the fast text attack against the brute-force oracle, one caption and one text at a time.

    python tests/exactness.py oracle  --victim clip --mode correct --model FOLDER --mlm FOLDER --data FILE --out DIR
    python tests/exactness.py compare --victim clip --mode correct --model FOLDER --mlm FOLDER --data FILE --out DIR
    python tests/exactness.py approximate --victim clip --mode correct ... --out DIR

The oracle is slow (25 encodings of one text each per caption): it writes as it goes, and goes on where it was stopped.
`compare` runs the library on the same captions, writes DIR/exactness-VICTIM-MODE.json, and fails when a text differs
although the oracle's decisions were clear. `approximate` measures how many texts stay the same under the opt-in
approximations: bf16 encoders, and first-order screening of candidates.

Victims: "clip", an open_clip model, guided by the clean image of each caption; "bert", a random text tower that reads
BERT's pieces, guided by random directions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from golden_models import BertTextEncoder  # noqa: E402
from oracles.word_substitution import Oracle  # noqa: E402

from fastmat.attacks.engine import Engine, executing  # noqa: E402
from fastmat.attacks.word_substitution import WordSubstitution  # noqa: E402
from fastmat.build import Component, build_data, build_mlm, build_model  # noqa: E402
from fastmat.data.loader import evaluation_batches  # noqa: E402
from fastmat.evaluation.evaluate import encode_gallery  # noqa: E402
from fastmat.quirks import Quirks  # noqa: E402
from fastmat.text.masked import MaskedCandidates  # noqa: E402
from fastmat.text.words import STOP_WORDS  # noqa: E402

CLEAR = 1e-5  # of scores: cosines
CLEAR_LEAD = 1e-8  # of importances: divergences of almost uniform distributions, around 1e-4
BATCH = 160


def settings(arguments: argparse.Namespace) -> dict:
    """Models, captions, guides [T, E] and quirks of a run."""
    clip = arguments.victim == "clip"
    model = build_model(Component(name="open_clip", arguments={"architecture": str(arguments.model)}))
    dataset = build_data(Component(name="json", arguments=data_of(arguments.data)), limit=arguments.images)
    texts = [caption for captions in dataset.captions for caption in captions]
    tokenizer = BertTokenizerFast.from_pretrained(str(arguments.mlm))
    if clip:
        gallery = encode_gallery(model, evaluation_batches(dataset, model.image_transform, batch_size=32))
        guide = gallery.image_features[gallery.txt2img]
    else:
        model, guide = random_bert(tokenizer, len(texts))
    official = Quirks.official(round_trip=clip, text_max_length=77 if clip else 30)
    quirks = official if arguments.mode == "official" else Quirks()
    return {"model": model.requires_grad_(False), "texts": texts, "guide": guide, "quirks": quirks, "tokens": tokenizer}


def data_of(annotations: Path) -> dict:
    named = {"title": annotations.parent.name, "split": annotations.stem}
    return {"annotations": str(annotations), "images": str(annotations.parent), **named}


def random_bert(tokenizer: BertTokenizerFast, count: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=128, initializer_range=0.1,
        )  # fmt: skip
        bert, projection = BertModel(config, add_pooling_layer=False), nn.Linear(64, 32)
        guide = nn.functional.normalize(torch.randn(count, 32), dim=-1)
    return BertTextEncoder(bert, projection, append_sep=True, tokenizer=tokenizer).eval(), guide


def run_oracle(arguments: argparse.Namespace) -> None:
    told = settings(arguments)
    mlm = build_mlm(str(arguments.mlm))
    oracle = Oracle(
        mlm.model, told["tokens"], told["model"], set(STOP_WORDS), told["quirks"], max_words=1, choice="cosine",
        importance="features", compare="features", top_k=10, threshold=0.3,
    )  # fmt: skip
    file = oracle_file(arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    done = len(file.read_text().splitlines()) if file.exists() else 0
    with file.open("a") as out:
        for text, guide in list(zip(told["texts"], told["guide"], strict=True))[done:]:
            found = oracle.attack(text, guide)
            out.write(json.dumps([text, found, oracle.margin, oracle.lead]) + "\n")
            out.flush()


def run_comparison(arguments: argparse.Namespace) -> None:
    told = settings(arguments)
    expected = [json.loads(line) for line in oracle_file(arguments).read_text().splitlines()]
    model, texts, guide = told["model"], told["texts"], told["guide"]
    assert [text for text, *_ in expected] == texts, "the oracle has not seen these captions to their end"
    mlm = build_mlm(str(arguments.mlm))
    search = WordSubstitution(candidates=MaskedCandidates(mlm=mlm), quirks=told["quirks"])
    found: list[str] = []
    start = time.process_time()
    for first in range(0, len(texts), BATCH):
        plan = search.plan(model, texts[first : first + BATCH])
        found += search.search(model, plan, guide[first : first + BATCH])
    seconds = time.process_time() - start
    unclear = [n for n, (_, _, margin, lead) in enumerate(expected) if margin <= CLEAR or lead <= CLEAR_LEAD]
    differing = [n for n, (_, adversarial, *_) in enumerate(expected) if adversarial != found[n]]
    wrong = sorted(set(differing) - set(unclear))
    result = {
        "victim": arguments.victim,
        "mode": arguments.mode,
        "captions": len(texts),
        "changed": sum(a != b for a, b in zip(texts, found, strict=True)),
        "identical": len(texts) - len(differing),
        "clear": {"margin": CLEAR, "lead": CLEAR_LEAD, "captions": len(texts) - len(unclear)},
        "differing_though_clear": [row(n, expected[n], found[n]) for n in wrong],
        "differing_and_unclear": [row(n, expected[n], found[n]) for n in differing if n not in wrong],
        "unclear": unclear,
    }
    file = arguments.out / f"exactness-{arguments.victim}-{arguments.mode}.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    said = {key: value for key, value in result.items() if isinstance(value, int | str)}
    print(json.dumps(said), f"{len(texts) / seconds:.0f} captions per second of CPU time")
    if wrong:
        sys.exit(1)


def run_approximations(arguments: argparse.Namespace) -> None:
    told = settings(arguments)
    model, texts, guide = told["model"], told["texts"], told["guide"]
    source = MaskedCandidates(mlm=build_mlm(str(arguments.mlm)), candidate_cache=arguments.out / "candidates")

    def attacked(engine: Engine, screen: int | None) -> list[str]:
        search = WordSubstitution(candidates=source, quirks=told["quirks"], screen=screen)
        found: list[str] = []
        with executing(engine, model):
            for first in range(0, len(texts), BATCH):
                plan = search.plan(model, texts[first : first + BATCH])
                found += search.search(model, plan, guide[first : first + BATCH])
        return found

    exact = attacked(Engine(), None)
    agreement = {}
    for name, engine, screen in (
        ("bf16", Engine(precision="bf16"), None),
        *((f"screen {n}", Engine(), n) for n in (1, 2, 3, 5)),
    ):
        found = attacked(engine, screen)
        agreement[name] = sum(a == b for a, b in zip(exact, found, strict=True)) / len(texts)
    result = {"victim": arguments.victim, "mode": arguments.mode, "captions": len(texts), "same_text": agreement}
    file = arguments.out / f"approximations-{arguments.victim}-{arguments.mode}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def row(n: int, expected: list, found: str) -> dict:
    text, adversarial, margin, lead = expected
    return {"caption": n, "text": text, "oracle": adversarial, "fast": found, "margin": margin, "lead": lead}


def oracle_file(arguments: argparse.Namespace) -> Path:
    return arguments.out / f"oracle-{arguments.victim}-{arguments.mode}.jsonl"


RUNS = {"oracle": run_oracle, "compare": run_comparison, "approximate": run_approximations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(RUNS))
    parser.add_argument("--victim", choices=("clip", "bert"), required=True)
    parser.add_argument("--mode", choices=("correct", "official"), required=True)
    parser.add_argument("--model", type=Path, required=True, help="an open_clip folder")
    parser.add_argument("--mlm", type=Path, required=True, help="a BertForMaskedLM folder")
    parser.add_argument("--data", type=Path, required=True, help="annotations, beside their images")
    parser.add_argument("--images", type=int, help="the first N images only")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    RUNS[arguments.what](arguments)


if __name__ == "__main__":
    main()
