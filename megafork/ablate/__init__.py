"""Ablations: recipes that differ in one thing each, run with the same seeds, and the effect of each difference."""
