"""Runs an original attack where fastmat is not installed; see peer.py. Needs torch, open_clip, transformers there.

python peer_driver.py FOLDER
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertTokenizerFast

LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "numpy")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]")
Made = tuple[Tensor, list[str]]
Run = Callable[[], Made]


class Victim(nn.Module):
    """A CLIP model with the methods that the originals call."""

    def __init__(self, folder: str, device: torch.device) -> None:
        super().__init__()
        self.clip = open_clip.create_model(f"local-dir:{folder}", device=device, precision="fp32").eval()
        self.spell = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.device = device
        config = self.clip.visual.preprocess_cfg
        self.mean, self.std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
        self.wordpieces: Any = None

    def normalization(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def inference_image(self, images: Tensor) -> dict[str, Tensor]:
        embeds = self.clip.encode_image(images)
        return {"image_embed": embeds, "image_feat": nn.functional.normalize(embeds, dim=-1)}

    def inference_text(self, text_input: Any) -> dict[str, Tensor]:
        texts = [self.wordpieces.spell(row) for row in text_input.input_ids]
        embeds = self.clip.encode_text(self.spell(texts).to(self.device))
        return {"text_embed": embeds, "text_feat": nn.functional.normalize(embeds, dim=-1)}


class Pieces:
    """What a tokenizer call gives."""

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self.input_ids = ids
        self.attention_mask = mask

    def to(self, device: torch.device) -> "Pieces":
        return Pieces(self.input_ids.to(device), self.attention_mask.to(device))


class WordPieces:
    """BERT's tokenizer as the originals bundle it: no [SEP], the old names of its methods."""

    def __init__(self, folder: str) -> None:
        self.fast = BertTokenizerFast.from_pretrained(folder)

    def __call__(self, texts: Any, max_length: int, **_: Any) -> Pieces:
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [self.fast.cls_token_id, *self.fast.convert_tokens_to_ids(self.fast.tokenize(text))][:max_length]
            rows.append(row + [self.fast.pad_token_id] * (max_length - len(row)))
        ids = torch.tensor(rows)
        return Pieces(ids, (ids != self.fast.pad_token_id).long())

    def tokenize(self, text: str) -> list[str]:
        return list(self.fast.tokenize(text))

    def spell(self, ids: Tensor) -> str:
        text = self.fast.decode(ids, clean_up_tokenization_spaces=True)
        for special in SPECIAL:
            text = text.replace(special, "")
        return text.strip()

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.fast.convert_ids_to_tokens(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace(" ##", "").strip()


class Classifier(nn.Module):
    """Images to logits over the captions, for attacks on classifiers; bounded images in, normalised inside."""

    def __init__(self, victim: Victim, texts: list[str]) -> None:
        super().__init__()
        self.victim = victim
        with torch.no_grad():
            features = nn.functional.normalize(victim.clip.encode_text(victim.spell(texts).to(victim.device)), dim=-1)
            self.prototypes = victim.clip.logit_scale.exp() * features

    def forward(self, images: Tensor, output_normalize: bool = True) -> Tensor:
        return self.victim.inference_image(self.victim.normalization(images))["image_feat"] @ self.prototypes.T


def sga(
    job: dict[str, Any], victim: Victim, bert: BertForMaskedLM, images: Tensor, texts: list[str], owner: list[int]
) -> Run:
    """8 images at a time, as published."""
    from attacker import ImageAttacker, SGAttacker, TextAttacker  # type: ignore[import-not-found]

    image_attacker = ImageAttacker(victim.normalization, eps=job["eps"], steps=job["steps"], step_size=job["step_size"])
    text_attacker = TextAttacker(bert, victim.wordpieces, cls=False, max_length=job["length"])
    attacker = SGAttacker(victim, image_attacker, text_attacker)

    def run() -> Made:
        found: list[Tensor] = []
        words: list[str] = []
        for start in range(0, len(images), 8):
            own = [t for t, image in enumerate(owner) if start <= image < start + 8]
            captions, rows = [texts[t] for t in own], [owner[t] - start for t in own]
            made, said = attacker.attack(
                images[start : start + 8], captions, rows, device=victim.device, max_lemgth=77, scales=job["scales"]
            )
            found.append(made)
            words += said
        return torch.cat(found), words

    return run


def co_attack(
    job: dict[str, Any], victim: Victim, bert: BertForMaskedLM, images: Tensor, texts: list[str], owner: list[int]
) -> Run:
    """Pairs, 32 at a time; later captions of an image overwrite earlier ones."""
    from attack.bert_attack import BertAttack  # type: ignore[import-not-found]
    from attack.imageAttack import ImageAttacker  # type: ignore[import-not-found]
    from attack.multimodalAttack import MultiModalAttacker  # type: ignore[import-not-found]

    image_attacker = ImageAttacker(job["eps"], preprocess=victim.normalization, bounding=(0, 1), cls=False)
    text_attacker = BertAttack(bert, victim.wordpieces, cls=False)
    attacker = MultiModalAttacker(victim, image_attacker, text_attacker, victim.wordpieces, cls=False)

    def run() -> Made:
        found, words = images.clone(), []
        for start in range(0, len(texts), 32):
            rows, captions = owner[start : start + 32], texts[start : start + 32]
            made, said = attacker.run_before_fusion(
                images[rows], captions, adv=4, num_iters=job["steps"], max_length=job["length"], alpha=job["alpha"]
            )
            for row, image in zip(rows, made, strict=True):
                found[row] = image
            words += said
        return found, words

    return run


def torchattacks_pgd(
    job: dict[str, Any], victim: Victim, bert: BertForMaskedLM, images: Tensor, texts: list[str], owner: list[int]
) -> Run:
    import torchattacks  # type: ignore[import-not-found]

    classifier = Classifier(victim, texts).eval()
    attack = torchattacks.PGD(classifier, eps=job["eps"], alpha=job["step_size"], steps=job["steps"])
    labels = torch.arange(len(images), device=victim.device)
    return lambda: (attack(images, labels), texts)


def robustvlm_pgd(
    job: dict[str, Any], victim: Victim, bert: BertForMaskedLM, images: Tensor, texts: list[str], owner: list[int]
) -> Run:
    from train.pgd_train import pgd  # type: ignore[import-not-found]

    classifier = Classifier(victim, texts).eval()
    labels = torch.arange(len(images), device=victim.device)

    def run() -> Made:
        start = torch.zeros_like(images).uniform_(-job["eps"], job["eps"]).requires_grad_()
        made = pgd(
            classifier, nn.functional.cross_entropy, images, labels, "linf", job["eps"], job["steps"],
            job["step_size"], True, perturbation=start, mode="max",
        )  # fmt: skip
        return made, texts

    return run


ATTACKS = {"SGA": sga, "Co-Attack": co_attack, "torchattacks": torchattacks_pgd, "RobustVLM": robustvlm_pgd}


def versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def prepare(folder: Path) -> tuple[str, Callable[[], Made]]:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.path.insert(0, job["checkout"])
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    tensors = load_file(str(folder / "batch.safetensors"))
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    victim = Victim(job["model"], device)
    victim.wordpieces = WordPieces(job["mlm"])
    bert = BertForMaskedLM.from_pretrained(job["mlm"], dtype=torch.float32).to(device).eval()
    images = tensors["images"].to(device)
    return job["name"], ATTACKS[job["name"]](job, victim, bert, images, texts, tensors["txt2img"].tolist())


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        name, run = prepare(folder)
        print(json.dumps({"ready": name, "versions": versions()}), flush=True)
        for _ in sys.stdin:
            begun = time.perf_counter()
            images, texts = run()
            if images.is_cuda:
                torch.cuda.synchronize()
            spent = time.perf_counter() - begun
            save_file({"images": images.detach().cpu().contiguous()}, str(folder / "images-out.safetensors"))
            (folder / "texts-out.json").write_text(json.dumps(list(texts)), encoding="utf-8")
            print(json.dumps({"seconds": spent}), flush=True)
    except Exception as error:  # the other side turns it into its own
        line = str(error).strip().splitlines()
        print(json.dumps({"error": f"{type(error).__name__}: {line[0] if line else ''}"}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
