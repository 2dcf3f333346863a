"""Write an augmented set: more captions or images of what is there, for one-to-many training.

    fastmat augment --with eda generator.lexicon=synonyms.json --data train.json --out sets/eda
    fastmat augment --with rewrite generator.model=HUB_ID --data train.json --out sets/rewritten
    fastmat augment --with jsonl:FILE --data train.json --out sets/mine
    fastmat augment --with module:function --data train.json --out sets/mine

It is read like any other set (annotations: augmented.json, images: the folder), says of every row
what made it, and can be augmented again. `augment.captions` and `augment.generated` of
`fastmat train` say how much of it a step sees.

    fastmat augment --report --data sets/eda/augmented.json --out runs/eda-report model=...

measures what was generated beside what humans wrote: alignment, diversity, distribution gap.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from fastmat.augment.measure import measure
from fastmat.augment.offline import ANNOTATIONS, Generator, Written, requests_of, write_augmented_set
from fastmat.augment.results import SourceReport
from fastmat.build import GENERATORS, build, build_data, build_model, resolve_device
from fastmat.cli.common import Interrupted, check_out, fingerprint, label_of, progress
from fastmat.cli.config import AugmentConfig
from fastmat.cli.keys import describe
from fastmat.cli.load import load_config, plain
from fastmat.cli.parser import Parser
from fastmat.data.loader import evaluation_batches
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError, nearest
from fastmat.evaluation.evaluate import encode_gallery
from fastmat.report.augmentation import PROPERTIES, cells, source_name, write_augmentation_report


def add_arguments(parser: Parser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides, such as copies=2")
    parser.add_argument("--config", metavar="NAME_OR_PATH", help="a YAML file")
    kinds = ", ".join(name for name in GENERATORS if name not in ("jsonl", "function"))
    parser.add_argument(
        "--with", dest="generator", metavar="GENERATOR", help=f"{kinds}, jsonl:FILE or module:function of your own"
    )
    parser.add_argument("--data", metavar="SET", help="digits, or a JSON file with its images beside it; or data={...}")
    parser.add_argument("--report", action="store_true", help="measure an augmented set instead of writing one")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder for what is written")
    parser.keys = partial(describe, AugmentConfig)


def run(arguments: argparse.Namespace) -> None:
    settings = [*given_by(arguments), *arguments.settings]
    config = load_config(AugmentConfig, arguments.config, settings)
    check_out(arguments.out, resume=False, sign=ANNOTATIONS)
    dataset = build_data(config.data, limit=config.limit)
    if arguments.report:
        print(report(config, dataset, arguments.out))
        return
    written = augment(config, dataset, arguments.out)
    made = " and ".join(
        f"{n:,} {what}" for n, what in ((written.captions, "captions"), (written.images, "images")) if n
    )
    print(f"{made} made, {written.dropped:,} results dropped: {written.annotations}")


def given_by(arguments: argparse.Namespace) -> list[str]:
    """--with and --data as overrides."""
    found = []
    if arguments.generator is not None:
        if arguments.report:
            raise UserError("--report measures a set that is there: leave --with out, and name the set by --data")
        found.append(f"generator={json.dumps(generator_named(arguments.generator))}")
    if arguments.data is not None:
        found.append(f"data={json.dumps(set_named(arguments.data))}")
    return found


def generator_named(text: str) -> dict[str, str]:
    """What `--with` names, as it stands in a config."""
    kind, colon, rest = text.partition(":")
    if not colon:
        if text not in GENERATORS:
            raise UserError(f"--with: unknown generator '{text}'{nearest(text, GENERATORS)}")
        return {"name": text}
    return {"name": "jsonl", "path": rest} if kind == "jsonl" else {"name": "function", "path": text}


def set_named(text: str) -> dict[str, str]:
    """What `--data` names: a built-in set, or a JSON file whose image paths start from its folder."""
    if text == "digits":
        return {"name": "digits"}
    path = Path(text)
    if not path.is_file():
        raise UserError(f"--data: {text} is no file; name a JSON file of images and captions, or digits")
    folder = path.resolve().parent
    return {"name": "json", "annotations": text, "images": str(folder), "title": folder.name, "split": path.stem}


def augment(config: AugmentConfig, dataset: RetrievalSet, out: Path) -> Written:
    """Write the augmented set in `out`."""
    if config.generator is None:
        raise UserError("nothing is named to augment with: add --with, such as --with eda")
    device = resolve_device(config.device)
    given = {"device": lambda: str(device)}
    generator: Generator = build(GENERATORS, config.generator, where="generator", given=given)
    copies = generator.copies or config.copies
    asked = sum(1 for _ in requests_of(dataset, generator, copies=copies, seed=config.seed))
    with progress(asked, f"{generator.name} of {dataset.name}/{dataset.split}", unit="request") as bar:
        try:
            return write_augmented_set(
                dataset,
                generator,
                out,
                copies=copies,
                seed=config.seed,
                batch_size=config.batch_size,
                tell=bar.update,
            )
        except KeyboardInterrupt as error:
            raise Interrupted("an augmented set is written whole, so nothing is kept") from error


def report(config: AugmentConfig, dataset: RetrievalSet, out: Path) -> str:
    """Measure `dataset`, write the report in `out`; returns the table for the terminal."""
    if config.model is None:
        raise UserError("--report needs a model whose features are measured: add model={name: ..., ...}")
    if not dataset.provenance:
        raise UserError(
            f"--report: {dataset.name}/{dataset.split} says of no caption that it was generated; name a set that "
            "`fastmat augment` wrote"
        )
    device = resolve_device(config.device)
    model = build_model(config.model, device=device)
    batches = evaluation_batches(dataset, model.image_transform, batch_size=config.batch_size)
    gallery = encode_gallery(model, batches)
    reports = measure(
        dataset, gallery.image_features, gallery.text_features, resamples=config.resamples, seed=config.seed
    )
    about = {
        "dataset": dataset.name,
        "split": dataset.split,
        "data_fingerprint": dataset.fingerprint(),
        "model": plain(config.model),
        "weights_sha256": fingerprint(model),
        "models": {maker.generator: maker.model for makers in dataset.provenance for maker in makers if maker},
        "seed": config.seed,
        "resamples": config.resamples,
    }
    title = f"{dataset.name}, {dataset.split}, under {label_of(config.model)}"
    page = write_augmentation_report(out, reports, title=title, about=about)
    return f"{table(reports)}\n{page}"


def table(reports: list[SourceReport]) -> str:
    """One line per source, values with their 95 % intervals."""
    lines = [("source", "made", *(name for _, name, _ in PROPERTIES))]
    for one in reports:
        shown = (f"{value} [{interval}]" if value else "-" for value, interval in cells(one))
        lines.append((source_name(one.source), f"{one.items:,} {one.made}s", *shown))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
