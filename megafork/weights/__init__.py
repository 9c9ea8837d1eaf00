"""Weights on the move: Hugging Face folders, Megatron checkpoints, and the bridge to vLLM."""

from megafork.compat import cpu

cpu.install()
