"""What a model is for besides retrieval: grounding, captioning, entailment, zero-shot classification; clean
and attacked.

A task is one file here with one class, and a line in `fastmat.build.TASKS`.
"""
