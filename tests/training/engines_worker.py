"""Run by torchrun in `test_engines.py`: one short training per case, "ENGINE/NAME", in every process."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from training.runs import again, go_on, run

from fastmat.training.engine import make_accelerator

KEYS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_FSDP", "FSDP_VERSION")
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
ENGINES = {
    "ddp": {},
    "zero1": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}


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
        accelerator = make_accelerator()
        if name.startswith("until"):
            go_on(out / "handed-over", int(name.removeprefix("until")), accelerator=accelerator)
        elif name.startswith("again-"):
            again(name.removeprefix("again-"), out / f"{engine}-{accelerator.num_processes}", accelerator=accelerator)
        else:
            run(name, out / f"{engine}-{accelerator.num_processes}" / name, accelerator=accelerator)
    dist.barrier()  # gloo may abort where one process leaves while another still talks
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
