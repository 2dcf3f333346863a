"""A checkout of the original code as an opponent: its own process, its own Python, one round at a time.

`peer_driver.py` runs there with the checkout on its path and nothing of fastmat. It is given a folder:

    job.json            attack, checkout, model folder, language model folder, device, threads, constants
    batch.safetensors   images [B, 3, H, W] fp32 in [0, 1], txt2img [T]
    texts.json          T captions

It answers with one JSON object a line: first {"ready": name, "versions": {...}}, then, for every line "round" that it
reads, {"seconds": s}; an error is {"error": sentence}. It ends with its standard input. After a round `texts-out.json`
and `images-out.safetensors` in the folder hold what the attack made.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastmat.benchmarks.attacks import co_attack, pgd, sga
from fastmat.benchmarks.attacks.setting import Setting, first_captions, write_batch
from fastmat.errors import UserError

DRIVER = Path(__file__).with_name("peer_driver.py")
# What lies in a checkout, the attack it is an opponent of, its name.
KNOWN = {
    "torchattacks/attacks/pgd.py": ("pgd", "torchattacks"),
    "train/pgd_train.py": ("pgd", "RobustVLM"),
    "attack/multimodalAttack.py": ("co_attack", "Co-Attack"),
    "attacker.py": ("sga", "SGA"),
}
CONSTANTS: dict[str, dict[str, Any]] = {
    "pgd": {"eps": pgd.EPS, "step_size": pgd.STEP, "steps": pgd.STEPS},
    "co_attack": {"eps": co_attack.EPS, "steps": co_attack.STEPS, "alpha": co_attack.ALPHA, "length": co_attack.FULL},
    "sga": {"eps": sga.EPS, "step_size": sga.STEP, "steps": sga.STEPS, "scales": sga.SCALES, "length": sga.LENGTH},
}


class Peer:
    """A running driver; a context manager. `attacks`: the job it belongs to; name; versions of its libraries."""

    def __init__(self, *, checkout: Path, python: str, setting: Setting, folder: Path) -> None:
        """Raises UserError when the checkout is none that is known or does not run."""
        kind = next((kind for file, kind in KNOWN.items() if (checkout / file).is_file()), None)
        if kind is None:
            raise UserError(
                f"--peer {checkout} has none of {', '.join(KNOWN)}; give a checkout of one of the originals"
            )
        self.attacks, self.name = kind
        self.folder = folder
        batch = first_captions(setting.batch) if self.attacks == "pgd" else setting.batch
        folder.mkdir(parents=True, exist_ok=True)
        write_batch(batch, folder)
        job = {
            "name": self.name,
            "checkout": str(checkout.resolve()),
            "model": str(setting.model_folder.resolve()),
            "mlm": str(setting.mlm_folder.resolve()),
            "device": str(setting.device),
            "threads": torch.get_num_threads(),
            **CONSTANTS[self.attacks],
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        try:
            self.process = subprocess.Popen(
                [python, str(DRIVER), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise UserError(f"--peer-python {python}: {error.strerror}; give a Python that runs") from None
        self.versions: dict[str, str] = self._answer("ready")["versions"]

    def round(self) -> float:
        """Milliseconds of one attack on the whole batch, measured over there."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, and `_answer` says so
        return 1e3 * float(self._answer("seconds")["seconds"])

    def texts(self) -> list[str]:
        """What its latest round made of the captions."""
        found: list[str] = json.loads((self.folder / "texts-out.json").read_text(encoding="utf-8"))
        return found

    def _answer(self, key: str) -> dict[str, Any]:
        """The next JSON line; anything else that the original prints is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and "error" in found:
                raise UserError(f"--peer: {self.name} does not run there ({found['error']})")
            if isinstance(found, dict) and key in found:
                return found
        raise UserError(
            f"--peer: {self.name} ended with status {self.process.wait()}; run {DRIVER.name} by hand to see"
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
