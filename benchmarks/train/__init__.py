"""Whole training steps, beside the loops that were published."""
