"""One import of torch and megatron for the whole test session; ranks are forked from it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("any machine", deadline=None)  # a busy machine is not a failure
settings.load_profile("any machine")
