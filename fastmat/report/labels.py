"""How names, radii and changed words read in a report."""

from __future__ import annotations

import difflib

from fastmat.evaluation.results import Row, Setting, Threat

DEFENCES = {
    "none": "No defence",
    "finetune": "Fine-tuning",
    "tecoa": "TeCoA",
    "tecoa_itr": "TeCoA-ITR",
    "fare": "FARE",
    "sim_clip": "Sim-CLIP",
    "pmg_aft": "PMG-AFT",
    "tga_zsr": "TGA-ZSR",
    "mmcoa": "MMCoA",
    "mat": "MAT",
}
ATTACKS = {
    "none": "Clean",
    "pgd": "PGD",
    "mi_fgsm": "MI-FGSM",
    "apgd": "APGD",
    "square": "Square",
    "bert_attack": "BERT-Attack",
    "sep": "Sep-Attack",
    "co_attack": "Co-Attack",
    "sga": "SGA",
    "cmi": "CMI-Attack",
    "dra": "DRA",
    "sa_aet": "SA-AET",
    "universal": "Universal",
    "alternating": "Alternating",
    "strongest": "Strongest",
    "corruption": "Corruption",
    "stylize": "Stylize",
    "text_perturbation": "Text perturbation",
}


def defence_name(name: str) -> str:
    return DEFENCES.get(name, name)


def attack_name(name: str) -> str:
    return ATTACKS.get(name, name)


def victim_name(setting: Setting) -> str:
    """The model judged: its name, and its defence where the name does not say it."""
    if setting.victim == setting.defence:
        return defence_name(setting.defence)
    return setting.victim if setting.defence == "none" else f"{setting.victim} ({defence_name(setting.defence)})"


def radius(value: float, norm: str) -> str:
    """As a fraction of 255 where that is how people say it.

    >>> radius(2 / 255, "linf"), radius(0.5, "l2"), radius(1.5 / 255, "linf")
    ('2/255', '0.5', '1.5/255')
    """
    return f"{round(value * 255, 2):g}/255" if norm == "linf" else f"{value:.3g}"


def budget(threat: Threat, rows: list[Row]) -> str:
    """What of the budget the attack can have used: a part that no row used at all is left out.

    rows: those that share the threat.
    """
    if not threat.budgeted:
        return "no budget"
    norm = "L\u221e" if threat.norm == "linf" else "L2"
    parts = []
    if any(row.max_distance > 0 for row in rows):
        parts.append(f"eps {radius(threat.eps, threat.norm)} ({norm})")
    if any(row.max_words_changed > 0 for row in rows):
        parts.append(words(threat.max_words))
    return ", ".join(parts)


def words(count: int) -> str:
    return "1 word" if count == 1 else f"{count} words"


def source(setting: Setting) -> str:
    """Whose gradients the attack used; nothing for clean data."""
    if setting.attack == "none":
        return ""
    return "white-box" if setting.white_box else f"transferred from {setting.surrogate}"


def marked_words(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both captions as (word, changed).

    >>> marked_words("a red dog", "a blue dog")
    ([('a', False), ('red', True), ('dog', False)], [('a', False), ('blue', True), ('dog', False)])
    """
    a, b = before.split(" "), after.split(" ")
    changed_a, changed_b = [True] * len(a), [True] * len(b)
    for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        changed_a[block.a : block.a + block.size] = [False] * block.size
        changed_b[block.b : block.b + block.size] = [False] * block.size
    return list(zip(a, changed_a, strict=True)), list(zip(b, changed_b, strict=True))
