"""Prompts, the tokenizer, and the verifiers that score responses."""
