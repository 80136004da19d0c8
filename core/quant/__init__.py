"""Weights: in which format they are kept, where they lie, and which of them a run does without."""
