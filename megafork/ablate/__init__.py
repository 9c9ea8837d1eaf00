"""Recipes that differ in one thing each, run over the same seeds, and what the difference makes."""
