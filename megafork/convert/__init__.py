"""`megafork convert`: conversion between Hugging Face folders and Megatron checkpoints, and quantised exports."""

from megafork.compat import cpu

cpu.install()
