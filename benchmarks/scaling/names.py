"""The parts of `fastmat bench scaling`; light to import."""

NAMES = ("predicted", "observed")
