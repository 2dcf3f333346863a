import pytest
import torch


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both implementations: on a GPU the kernels are compiled, without one they run in Triton's interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
