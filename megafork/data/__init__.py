"""Prompts, the tokenizer, and verifiers that score responses."""
