"""`megafork convert`: Hugging Face folders and Megatron checkpoints, each into the other, and quantised exports."""

from megafork.compat import cpu

cpu.install()
