"""fastmat: attack and harden vision-language models, fast and exactly."""

__version__ = "0.1.0"
