"""Candidates of captions on disk: computed once, read by every attack, epoch and process.

    FOLDER/<scope>/manifest.json                    what the candidates were computed with
    FOLDER/<scope>/<process>-<random>.jsonl         a header, then one record per caption

A scope is everything but the caption: weights, vocabulary and shape of the language model, the filters, `top_k`,
`threshold`, `max_length`, the quirks that change candidates, and the arithmetic, because bf16 or TF32 rank differently.
A record is found by a hash of the words, their pieces (hence of the tokenizer, whatever it does) and the words asked.

Every process appends to a segment of its own and never changes what it wrote, so writers need no lock and a kill can
only cut the last line of one segment: a reader stops before a line without its end, and the caption is computed again.
Sharding by hash would instead have several processes write to one file. Memory holds where a record lies, not what it
says: of 567,000 captions about 120 MB, not gigabytes. Nothing is unpickled; every record has a checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import warnings
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text import candidates
from fastmat.text.candidates import Found, find_candidates
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.text.words import STOP_WORDS, Words

FORMAT = 1  # another number for every change of what `find_candidates` returns or of how records are written
QUIRKS = ("candidate_row_offset", "append_sep", "blanks_in_candidates", "case_sensitive_filters")
SHAPE = ("num_attention_heads", "hidden_act", "layer_norm_eps")  # of BERT; the rest is in the weights' names and shapes
MANIFEST = "manifest.json"
CAPTIONS_PER_WRITE = 1024  # computed and written at a time: what a kill costs at most
RECORD = re.compile(rb'\["([0-9a-f]{32})","([0-9a-f]{8})",(\{.*\})\]\n')

log = logging.getLogger(__name__)


class CandidateCache:
    """`find_candidates` with a memory on disk; one folder serves any number of language models, settings and processes.

    hits, misses: captions answered from the folder, and captions that had to be computed, so far. A call that misses
        says so in one log line at level INFO.
    Raises UserError for a folder that cannot be used, a damaged file, and one of another language model or settings.
    """

    def __init__(self, *, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"folder of candidates {self.folder} is a file: give a directory")
        self.hits = 0
        self.misses = 0
        self._scopes: dict[str, Scope] = {}

    def __call__(
        self,
        mlm: MaskedLanguageModel,
        captions: Sequence[Words],
        wanted: Sequence[Sequence[int]],
        /,
        *,
        top_k: int,
        threshold: float,
        quirks: Quirks,
        max_length: int,
    ) -> list[Found]:
        """As `find_candidates`; captions that no process has stored are computed and stored."""
        scope = self._scope(mlm, top_k=top_k, threshold=threshold, quirks=quirks, max_length=max_length)
        keys = [_key(caption, indices) for caption, indices in zip(captions, wanted, strict=True)]
        missing = scope.missing(keys)
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        computed: dict[bytes, Found] = {}
        for start in range(0, len(missing), CAPTIONS_PER_WRITE):
            chunk = missing[start : start + CAPTIONS_PER_WRITE]
            found = find_candidates(
                mlm,
                [captions[first[key]] for key in chunk],
                [wanted[first[key]] for key in chunk],
                top_k=top_k,
                threshold=threshold,
                quirks=quirks,
                max_length=max_length,
            )
            fresh = dict(zip(chunk, found, strict=True))
            scope.append(fresh)
            computed |= fresh
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        if missing:
            log.info(
                "candidates: %d of %d captions computed, the others were in %s (so far %d computed, %d found)",
                len(missing), len(keys), scope.folder, self.misses, self.hits,
            )  # fmt: skip
        stored = scope.read([key for key in keys if key not in computed])
        return [dict(computed[key] if key in computed else stored[key]) for key in keys]

    def _scope(self, mlm: MaskedLanguageModel, **settings: Any) -> Scope:
        manifest = describe(mlm, **settings)
        digest = _digest(manifest)
        if digest not in self._scopes:
            self._scopes[digest] = Scope(self.folder / digest[:16], manifest, digest)
        return self._scopes[digest]


class Scope:
    """The segments of one folder, all computed with what `manifest` says."""

    def __init__(self, folder: Path, manifest: dict[str, Any], digest: str) -> None:
        self.folder = folder
        self.header = _line({"candidates": FORMAT, "mlm": manifest["mlm"], "scope": digest})
        self._segments: list[Path] = []
        self._end: dict[Path, int] = {}  # bytes of each segment that are indexed
        self._index: dict[bytes, tuple[int, int]] = {}  # key to number of its segment and offset of its record
        self._own: tuple[int, Path] | None = None  # this process and its segment
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_manifest(manifest)
        except OSError as error:
            raise UserError(f"folder of candidates {folder} cannot be used ({error.strerror}): give another") from error

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those that no segment holds, each once; looks at what other processes wrote only when one is unknown."""
        distinct = dict.fromkeys(keys)
        if any(key not in self._index for key in distinct):
            for path in sorted(self.folder.glob("*.jsonl")):
                self._index_segment(path)
        return [key for key in distinct if key not in self._index]

    def read(self, keys: Sequence[bytes]) -> dict[bytes, Found]:
        """The records of keys that are not missing."""
        found: dict[bytes, Found] = {}
        places = sorted((*self._index[key], key) for key in dict.fromkeys(keys))
        for number, of_segment in groupby(places, key=itemgetter(0)):
            path = self._segments[number]
            try:
                with path.open("rb") as file:
                    for _, offset, key in of_segment:
                        file.seek(offset)
                        own, payload = _record(file.readline()) or _damaged(path, offset)
                        if own != key:
                            _damaged(path, offset)
                        found[key] = {int(i): tuple(words) for i, words in json.loads(payload).items()}
            except FileNotFoundError:
                raise UserError(f"{path} was removed while it was in use: start again, candidates are kept") from None
        return found

    def append(self, found: dict[bytes, Found]) -> None:
        """Whole lines, in one write, to the segment of this process; it is indexed when a key is next missing."""
        if self._own is None or self._own[0] != os.getpid():  # a forked child writes to its own
            self._own = (os.getpid(), self.folder / f"{os.getpid()}-{secrets.token_hex(6)}.jsonl")
        lines = b"".join(_write_record(key, of) for key, of in found.items())
        try:
            with self._own[1].open("ab") as file:
                file.write(lines if file.tell() else self.header + lines)
        except OSError as error:
            self._own = None  # its last line may be cut: nothing may follow it
            warnings.warn(f"candidates are not stored: {self.folder} ({error.strerror})")

    def _index_segment(self, path: Path) -> None:
        """Note the records that were added to a segment since it was last seen."""
        start = self._end.get(path, 0)
        if path.stat().st_size <= start:
            return
        with path.open("rb") as file:
            if not start:
                header = file.readline()
                if not header.endswith(b"\n"):
                    return  # cut before it held anything
                self._check_header(path, header)
                start = len(header)
                self._segments.append(path)
            number = self._segments.index(path)
            self._end[path] = start
            file.seek(start)
            for key, offset, stop in _whole_records(path, file, start):
                self._index.setdefault(key, (number, offset))
                self._end[path] = stop

    def _check_header(self, path: Path, line: bytes) -> None:
        if line == self.header:
            return
        header, own = _parsed(line), json.loads(self.header)
        if not isinstance(header, dict) or "mlm" not in header:
            raise UserError(f"{path} is no file of candidates: move it away")
        what = "another masked language model" if header["mlm"] != own["mlm"] else "other settings"
        raise UserError(f"{path} holds candidates of {what}: move it away")

    def _check_manifest(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, whole or not at all; refuse the folder when it has that of others."""
        path = self.folder / MANIFEST
        if not path.exists():
            temporary = self.folder / f".{MANIFEST}.{secrets.token_hex(6)}"
            try:
                temporary.write_bytes(json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        written = _parsed(path.read_bytes())
        if not isinstance(written, dict):
            raise UserError(f"{path} is damaged: delete {self.folder}, its candidates are computed again")
        differing = sorted(key for key in manifest.keys() | written.keys() if manifest.get(key) != written.get(key))
        if differing:
            whose = "of another masked language model" if "mlm" in differing else "made with other settings"
            raise UserError(f"{self.folder} holds candidates {whose} ({', '.join(differing)}): move it away")


def describe(
    mlm: MaskedLanguageModel, *, top_k: int, threshold: float, quirks: Quirks, max_length: int
) -> dict[str, Any]:
    """All that candidates depend on beside the caption, as JSON has it."""
    device = mlm.model.device.type
    backend = getattr(torch.backends, "cuda" if device == "cuda" else "mkldnn")
    return {
        "format": FORMAT,
        "mlm": mlm.fingerprint,
        "mlm_shape": {name: str(getattr(mlm.model.config, name)) for name in SHAPE},
        "special_ids": [mlm.cls_id, mlm.sep_id, mlm.pad_id],
        "top_k": top_k,
        "threshold": float(threshold),
        "max_length": max_length,
        "quirks": {name: getattr(quirks, name) for name in QUIRKS},
        "stop_words": _digest(sorted(STOP_WORDS)),
        "combinations": [candidates.ROWS_PER_WORD, candidates.IDS_PER_ROW, candidates.COMBINATIONS],
        "device": device,
        "autocast": str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
        "fp32_products": backend.matmul.fp32_precision,
    }


def _key(caption: Words, wanted: Sequence[int]) -> bytes:
    """32 hexadecimal digits."""
    content = json.dumps([caption.words, caption.spans, caption.pieces, list(wanted)])
    return hashlib.sha256(content.encode()).hexdigest()[:32].encode()


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _line(content: object) -> bytes:
    return json.dumps(content, sort_keys=True).encode() + b"\n"


def _write_record(key: bytes, found: Found) -> bytes:
    """`["key","checksum",{"word index":["candidate",...],...}]`; ASCII, whatever the script of the words."""
    payload = json.dumps(found, separators=(",", ":")).encode()
    return b'["%s","%08x",%s]\n' % (key, zlib.crc32(key + payload), payload)


def _record(line: bytes) -> tuple[bytes, bytes] | None:
    """Key and payload of a record, None for a damaged one."""
    match = RECORD.fullmatch(line)
    if match is None or zlib.crc32(match[1] + match[3]) != int(match[2], 16):
        return None
    return match[1], match[3]


def _whole_records(path: Path, lines: Iterator[bytes], start: int) -> Iterator[tuple[bytes, int, int]]:
    """Key, first byte and end of each record from byte `start` on, up to a line that is being written or was cut."""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        key, _ = _record(line) or _damaged(path, start)
        yield key, start, start + len(line)
        start += len(line)


def _damaged(path: Path, offset: int) -> tuple[bytes, bytes]:
    raise UserError(f"{path} is damaged at byte {offset}: delete it, what it held is computed again")


def _parsed(content: bytes) -> object:
    """The JSON, None for anything else."""
    try:
        return json.loads(content)
    except ValueError:
        return None
