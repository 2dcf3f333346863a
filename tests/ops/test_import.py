import subprocess
import sys


def test_ops_need_torch_alone() -> None:
    heavy = ["transformers", "open_clip", "torchvision", "sklearn", "matplotlib", "accelerate", "PIL", "pydantic"]
    code = f"import sys, fastmat.ops; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
