"""The steps that are measured; light to import."""

NAMES = ("mat", "fare", "tecoa")  # each is fastmat/benchmarks/train/NAME.py
