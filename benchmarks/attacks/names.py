"""The attacks that are measured; light to import."""

from fastmat.build import ATTACKS

# Each is fastmat/benchmarks/attacks/NAME.py; an attack that fastmat lacks is left out.
NAMES = tuple(name for name in ("pgd", "bert_attack", "co_attack", "sga", "sa_aet") if name in ATTACKS)
