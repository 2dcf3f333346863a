"""Small sets on disk in the public annotation formats of the tasks."""

import json
import pickle
from pathlib import Path

import torch
from PIL import Image

WORDS = [
    "a red dog runs",
    "the cat sits in the snow",
    "a man with a ball",
    "the black cat",
    "a red ball",
    "dog in park",
]
# Per picture: height and width, as COCO's are none square.
SIZES = [(40, 60), (64, 48), (50, 50), (33, 71)]


def write_pictures(folder: Path, names: list[str], *, seed: int = 0) -> None:
    """Noise of the sizes `SIZES`, smooth enough that patches differ."""
    generator = torch.Generator().manual_seed(seed)
    for i, name in enumerate(names):
        height, width = SIZES[i % len(SIZES)]
        coarse = torch.rand(3, 6, 6, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse[None], (height, width), mode="bilinear")[0]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()).save(path)


def write_refcoco(folder: Path, *, json_refs: bool = False) -> dict[str, str]:
    """Four pictures with two referred objects each, two expressions per object; arguments of the task `grounding`."""
    names = [f"train2014/COCO_train2014_{100 + i:012d}.jpg" for i in range(4)]
    write_pictures(folder / "images", names)
    generator = torch.Generator().manual_seed(1)
    refs, rows, images, annotations, detections = [], [], [], [], {}
    for i, name in enumerate(names):
        height, width = SIZES[i]
        images.append({"id": 100 + i, "height": height, "width": width, "file_name": Path(name).name})
        boxes = []
        for _ in range(5):
            w, h = (float(torch.randint(8, side // 2, (1,), generator=generator)) for side in (width, height))
            x, y = (float(torch.rand(1, generator=generator)) * (side - s) for side, s in ((width, w), (height, h)))
            boxes.append([x, y, w, h])
        detections[str(100 + i)] = [[*box, 0.9] for box in boxes]
        for j in range(2):
            ref_id, ann_id = 10 * i + j, 1000 + 10 * i + j
            annotations.append({"id": ann_id, "image_id": 100 + i, "bbox": [v + 0.5 for v in boxes[j]]})
            split = ("val", "testA", "testB", "val")[i]
            refs.append({"ref_id": ref_id, "ann_id": ann_id, "image_id": 100 + i, "split": split, "sent_ids": [0]})
            for k in range(2):
                rows.append({"image": name, "text": f"The {WORDS[(i + j + 3 * k) % 6]}, left!", "ref_id": ref_id})
    (folder / "val.json").write_text(json.dumps(rows[:4] + rows[12:]))
    (folder / "test.json").write_text(json.dumps(rows[4:12]))
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "dets.json").write_text(json.dumps(detections))
    refs_file = folder / ("refs.json" if json_refs else "refs(unc).p")
    refs_file.write_bytes(json.dumps(refs).encode() if json_refs else pickle.dumps(refs, protocol=2))
    return {
        "annotations": [str(folder / "val.json"), str(folder / "test.json")],  # type: ignore[dict-item]
        "refs": str(refs_file),
        "instances": str(folder / "instances.json"),
        "detections": str(folder / "dets.json"),
        "images": str(folder / "images"),
    }


def write_snli_ve(folder: Path) -> dict[str, str]:
    """Three pictures, nine labelled pairs and one that nobody agreed on; arguments of the task `entailment`."""
    write_pictures(folder / "images", [f"{i}.jpg" for i in range(3)])
    labels = ["entailment", "neutral", "contradiction"]
    rows = [
        {"Flickr30K_ID": str(i), "gold_label": labels[k], "sentence2": WORDS[(2 * i + k) % 6], "pairID": f"{i}#{k}r1x"}
        for i in range(3)
        for k in range(3)
    ]
    rows.append({"Flickr30K_ID": "0", "gold_label": "-", "sentence2": "nobody knows", "pairID": "0#9r1x"})
    (folder / "snli_ve_test.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    albef = [
        {"image": row["Flickr30K_ID"], "sentence": row["sentence2"], "label": row["gold_label"]} for row in rows[:9]
    ]
    (folder / "ve_test.json").write_text(json.dumps(albef))
    return {"annotations": str(folder / "snli_ve_test.jsonl"), "images": str(folder / "images")}


def write_coco_captions(folder: Path) -> dict[str, str]:
    """Five pictures with two captions each, and one without any; arguments of the task `captioning`."""
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(6)]
    write_pictures(folder / "images", names)
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "caption": WORDS[(i + 2 * k) % 6]} for k in range(2) for i in range(5)
        ],
    }
    (folder / "captions_val.json").write_text(json.dumps(content))
    return {"annotations": str(folder / "captions_val.json"), "images": str(folder / "images")}
