import torch


def pytest_configure() -> None:
    # Small tensors on shared cores: more threads only wait for one another.
    torch.set_num_threads(1)
