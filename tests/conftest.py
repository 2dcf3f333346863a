import os

import torch

# Before any kernel is imported: without a GPU, Triton kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    # Small tensors on shared cores: more threads only wait for one another.
    torch.set_num_threads(1)
