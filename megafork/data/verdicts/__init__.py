"""Verdicts on untrusted responses: verifier processes, their sandbox, and programs run against tests."""
