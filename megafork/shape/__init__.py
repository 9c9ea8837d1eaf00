"""The shape of a transformer, read from a Hugging Face config.json, and the layouts into which it can be split.

Imports neither torch nor transformers, so a wrong model folder is rejected in a fraction of a second.
"""

from megafork.shape.config import read_config, refuse_adapter
from megafork.shape.families import FAMILIES, unfused
from megafork.shape.family import Family, HFTensor, Rule, Span
from megafork.shape.layout import check_engines, check_layout, check_length, check_rollout_tp, check_world, stage_layers, stage_of_layer
from megafork.shape.model import Llama3, Mixture, Shape, Yarn
from megafork.shape.read import read_dtype, read_shape

__all__ = [
    "FAMILIES",
    "Family",
    "HFTensor",
    "Llama3",
    "Mixture",
    "Rule",
    "Shape",
    "Span",
    "Yarn",
    "check_engines",
    "check_layout",
    "check_length",
    "check_rollout_tp",
    "check_world",
    "read_config",
    "read_dtype",
    "read_shape",
    "refuse_adapter",
    "stage_layers",
    "stage_of_layer",
    "unfused",
]
