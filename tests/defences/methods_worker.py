"""Run by `test_methods_distributed.py`, in one process or by torchrun: a short training per case, "ENGINE/NAME"."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from defences.labelled_batch import PROMPTS, LastWord
from training.engines_worker import ENGINES, KEYS
from training.synthetic import THREAT, Synthetic, make_batch, settings

from fastmat.defences.embedding_space import EmbeddingSpace
from fastmat.defences.mat import MAT
from fastmat.defences.mmcoa import MMCoA
from fastmat.defences.pmg_aft import PMGAFT
from fastmat.defences.sim_clip import SimCLIP
from fastmat.defences.tecoa import TeCoA
from fastmat.defences.tga_zsr import TGAZSR
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.training.engine import make_accelerator
from fastmat.training.loop import train
from fastmat.types import Batch

CLASSES = {"against": "classes", "prompts": PROMPTS}
METHODS = {
    "tecoa": lambda: TeCoA(threat=THREAT, prompts=PROMPTS),
    "pmg_aft": lambda: PMGAFT(threat=THREAT, teacher=tiny_clip(seed=1), quirks=Quirks(summed_kl=True), **CLASSES),
    "pmg_aft_captions": lambda: PMGAFT(threat=THREAT, teacher=tiny_clip(seed=1), trains=("image", "text")),
    "tga_zsr": lambda: TGAZSR(threat=THREAT, teacher=tiny_clip(seed=1)),
    "sim_clip": lambda: SimCLIP(threat=THREAT, steps=2),
    "mmcoa": lambda: MMCoA(threat=THREAT, candidates=LastWord(), steps=2),
    "mat": lambda: MAT(
        threat=THREAT,
        teacher=tiny_clip(seed=1),
        text_search=EmbeddingSpace(step_size=0.1),
        pairs={"adv-adv": 1.0, "clean-clean": 0.5},
        distances={"image-adv-teacher": 0.1, "text-adv-teacher": 0.1, "text-adv-clean": 0.1},
    ),
}


@dataclass
class Labelled(Synthetic):
    """The same images with one class prompt each."""

    def iterate(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        share = self.size // world
        for step in range(start, stop):
            batch = make_batch(size=self.size, seed=step)
            labels = torch.randint(len(PROMPTS), (self.size,), generator=torch.Generator().manual_seed(step))
            texts = tuple(PROMPTS[label][0] for label in labels)
            whole = replace(batch, texts=texts, txt2img=torch.arange(self.size), group=labels)
            yield whole.rows(rank * share, (rank + 1) * share)


def run(name: str, out: Path, **others: object) -> None:
    batches = (Labelled if name in ("tecoa", "pmg_aft") else Synthetic)(size=8)
    told = settings(steps=3, lr=1e-3, save_every=3)
    train(tiny_clip(), METHODS[name](), batches, settings=told, out=out, config={"run": name}, **others)


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for case in sys.argv[2:]:
        engine, name = case.split("/")
        for key in KEYS:
            os.environ.pop(key, None)
        os.environ.update(ENGINES[engine])
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        run(name, out / engine / name, accelerator=make_accelerator())
    dist.barrier()  # gloo may abort where one process leaves while another still talks
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
