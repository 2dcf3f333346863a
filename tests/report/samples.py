"""A made-up evaluation with everything a report shows."""

import base64
import io

from PIL import Image

from fastmat.evaluation.results import Example, Examples, Results, RetrievedImage, RetrievedText, Row, Threat

NASTY = '<script>alert("x")</script> & "dog" $x_1$'
DEFENCES = {"finetune": 0.0, "tecoa_itr": 12.0, "fare": 9.0, "mat": 27.0}
ATTACKS = {"none": 62.0, "pgd": 21.0, "bert_attack": 38.0, "sep": 12.0, "sga": 4.0}


def made_row(
    *, defence: str = "mat", attack: str = "sga", eps: float = 2 / 255, tr: float = 30.0, **changes: object
) -> Row:
    clean = attack == "none"
    rates = {"tr@1": tr, "tr@5": min(99.0, tr + 20), "tr@10": min(100.0, tr + 28)}
    rates |= {name.replace("tr", "ir"): max(0.0, value - 6) for name, value in rates.items()}
    asr = {f"asr_{name}": None if clean else round(100 - value, 2) for name, value in rates.items()}
    measured = {name: value for name, value in (rates | asr).items() if value is not None}
    values: dict[str, object] = {
        "surrogate": defence,
        "victim": defence,
        "defence": defence,
        "attack": attack,
        "threat": Threat() if clean else Threat(eps=eps, max_words=1),
        "dataset": "digits",
        "split": "test",
        "seed": 0,
        "n_images": 1000,
        "n_captions": 5000,
        **rates,
        **asr,
        "ci": {name: (max(0.0, value - 2.5), min(100.0, value + 2.5)) for name, value in measured.items()},
        "max_distance": 0.0 if attack in ("none", "bert_attack") else eps,
        "max_words_changed": 1 if attack in ("bert_attack", "sep", "sga") else 0,
        "seconds": None if clean else 61.5,
        "pairs_per_s": None if clean else 81.3,
    }
    return Row.model_validate(values | changes)


def picture(colour: tuple[int, int, int], size: int = 64) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def made_example(caption: str = "a red seven left of a green two") -> Example:
    def texts(correct: int) -> list[RetrievedText]:
        return [RetrievedText(text=f"a caption at place {i + 1}", correct=i == correct) for i in range(5)]

    def images(correct: int) -> list[RetrievedImage]:
        return [RetrievedImage(png=picture((40 * i, 90, 120)), correct=i == correct) for i in range(5)]

    return Example(
        image="photo 17",
        setting=made_row(),
        clean=picture((200, 30, 30)),
        adversarial=picture((202, 28, 32)),
        difference=picture((128, 120, 140)),
        magnification=63,
        distance=2 / 255,
        caption_before=caption,
        caption_after=caption.replace("red", "scarlet"),
        texts_before=texts(0),
        texts_after=texts(3),
        images_before=images(0),
        images_after=images(9),
        image_rank_before=1,
        image_rank_after=4,
        caption_rank_before=1,
        caption_rank_after=12,
    )


def made_results() -> Results:
    rows = [
        made_row(defence=defence, attack=attack, tr=max(0.0, base + gain * (0.2 if attack == "none" else 1)))
        for defence, gain in DEFENCES.items()
        for attack, base in ATTACKS.items()
    ]
    rows += [
        made_row(defence=defence, attack="sga", eps=eps / 255, tr=max(0.0, 4 + gain - 3 * eps))
        for defence, gain in DEFENCES.items()
        for eps in (1, 4, 8)
    ]
    rows.append(made_row(defence="mat", attack="sga", tr=44, surrogate="finetune"))
    return Results.model_validate(
        {
            "rows": rows,
            "config": {"attack": {"steps": 10}, "note": NASTY},
            "environment": {"python": "3.11", "device": "cpu"},
            "training": {
                name: [{"step": s, "loss": 3.0 / (1 + s / 40) + i / 4} for s in range(0, 200, 10)]
                for i, name in enumerate(DEFENCES)
            },
        }
    )


def made_examples() -> Examples:
    return Examples(
        chosen="Drawn at random, seed 0, among the images that fine-tuning retrieves correctly when clean.",
        examples=[made_example(), made_example(f"a red {NASTY}")],
    )
