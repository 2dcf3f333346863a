"""The models that re-rank; light to import."""

NAMES = ("albef", "blip")
