"""Test-time defences: what is done to images before they are encoded, and the wrapper that makes a model of it.

None of them is a defence until it has been attacked through itself: `fastmat study test-time`.
"""
