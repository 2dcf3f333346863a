"""README's Python runs, and the commands it shows are real."""

import re
import shlex
from pathlib import Path

import pytest

from fastmat.cli.main import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()
CONFIGS = Path(__file__).parent.parent / "configs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_commands_and_configs_exist() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if "fastmat" in line and "git" not in line]
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(line.replace("$(which fastmat)", "fastmat"))
        command = words[words.index("fastmat") + 1]
        assert command in COMMANDS
        if "--config" in words:
            assert (CONFIGS / f"{words[words.index('--config') + 1]}.yaml").is_file(), line


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
