"""Loading, saving and transferring weights: Hugging Face folders, Megatron checkpoints, and the bridge to vLLM."""

from megafork.compat import cpu

cpu.install()
