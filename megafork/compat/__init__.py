"""All patches of third-party code, each with its reason, the versions it is for, and when it can go.

For each patch a test in `tests/test_compat*.py` checks that the unpatched library still fails; when it breaks, the patch can be deleted.
"""

import os

# read by Transformer Engine when megatron-core imports it: scales of FP8 blocks in fp32, as in vLLM, not rounded to powers of two
os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
