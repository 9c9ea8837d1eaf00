"""Verdicts on responses nobody trusts: verifier processes, their sandbox, and programs run against tests."""
