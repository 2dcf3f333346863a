import resource
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from fastmat.cli.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(6):
    torch.ones(20_000_000).mul_(2)  # 80 MB, above what glibc keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_blocks_are_not_faulted_in_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    }
    block = 80_000_000 // resource.getpagesize()
    assert faults["return"] - faults["keep"] > 3 * block
