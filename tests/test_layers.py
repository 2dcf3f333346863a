"""The plan of the house: imports flow one way, and `fastmat.ops` needs torch alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Lowest first; a part may import itself, what stands below it, and the leaves.
ORDER = (
    ("kernels",),
    ("ops",),
    ("models",),
    ("data", "text"),
    ("attacks",),
    ("defences", "guards", "augment", "alignment"),
    ("perturbations",),  # attacks, some made of generators; built by name
    ("training", "evaluation"),
    ("tasks",),
    ("pipeline",),
    ("report",),
    ("build",),
    ("benchmarks",),
    ("cli",),
    ("studies",),  # made of commands; `fastmat study` finds them by name
)
LEAVES = {"types", "quirks", "errors", "memory"}
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
# Beyond the order: what these may import is listed whole.
NARROW = {
    "kernels": set(),
    "data": set(),
    "text": {"models.protocol"},
    "report": {"evaluation.results", "augment.results", "training.results", "tasks.results", "pipeline.results"},
}
# These see models through the protocol and through files of weights, never a concrete class.
WITHOUT_CONCRETE_MODELS = (
    "attacks",
    "alignment",
    "defences",
    "guards",
    "augment",
    "perturbations",
    "training",
    "evaluation",
    "tasks",
    "pipeline",
)
ABSTRACT_MODELS = {"models.protocol", "models.sharding", "models.weights"}
TOPS = ("fastmat", "kernels", "configs", "benchmarks")
FILES = sorted(file for top in TOPS for file in ROOT.glob(f"{top}/**/*.py"))


def imports(file: Path) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands; `from a.b import c` gives "a.b" and "a.b.c"."""
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(file: Path) -> str:
    """ "attacks" for fastmat/attacks/pgd.py, "build" for fastmat/build.py, "kernels" for kernels/pgd.py."""
    path = file.relative_to(ROOT)
    return path.parts[0] if path.parts[0] != "fastmat" else path.parts[1].removesuffix(".py")


def violations(part: str, modules: Iterator[str]) -> list[str]:
    """The imports that `part` may not have."""
    wrong = []
    for module in modules:
        head, *rest = module.split(".")
        if head == "triton" and part != "kernels":
            wrong.append(module)
        if head != "fastmat" or not rest or rest[0] in LEAVES or rest[0] not in LEVEL or rest[0] == part:
            continue
        inner = ".".join(rest[:2])
        if part in LEAVES or LEVEL[rest[0]] >= LEVEL.get(part, len(ORDER)):
            wrong.append(module)
        elif part in NARROW:
            wrong += [] if inner in NARROW[part] else [module]
        elif part in WITHOUT_CONCRETE_MODELS and rest[0] == "models" and inner not in ABSTRACT_MODELS:
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_flow_one_way(file: Path) -> None:
    assert violations(part_of(file), imports(file)) == []


def test_every_part_has_its_place() -> None:
    parts = {part_of(file) for file in FILES} - LEAVES - {"__init__", "__main__", "configs"}
    assert parts <= set(LEVEL), "a new part of the house: give it a place in ORDER"


@pytest.mark.parametrize(
    ("part", "module"),
    [
        ("ops", "fastmat.attacks.pgd"),
        ("attacks", "fastmat.models.open_clip"),
        ("evaluation", "fastmat.training.loop"),
        ("training", "fastmat.evaluation.results"),
        ("data", "fastmat.models.protocol"),
        ("text", "fastmat.models.tiny"),
        ("report", "fastmat.evaluation.evaluate"),
        ("ops", "triton"),
        ("types", "fastmat.ops"),
    ],
)
def test_the_rule_itself_refuses(part: str, module: str) -> None:
    assert violations(part, iter([module])) == [module]


def test_ops_need_torch_alone() -> None:
    heavy = [
        "transformers",
        "open_clip",
        "timm",
        "PIL",
        "torchvision",
        "sklearn",
        "matplotlib",
        "accelerate",
        "yaml",
        "pydantic",
    ]
    code = f"import sys, fastmat.ops; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_the_kernels_folder_does_not_claim_the_name_kernels() -> None:
    """transformers looks for a package `kernels`; ours may be found in its place, so it must be empty."""
    body = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
