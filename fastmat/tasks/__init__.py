"""What a model is for besides retrieval: visual grounding, captioning, visual entailment; clean and attacked.

A task is one file here with one class, and a line in `fastmat.build.TASKS`.
"""
