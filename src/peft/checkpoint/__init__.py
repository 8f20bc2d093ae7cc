"""Adapters in and out of files: their tensors and names, the two files on disk, the model card, the hub.

This room knows configurations, the mechanism in `core` and the methods; it knows no model class.
"""

from peft.checkpoint.base_state import get_base_model_state_dict, set_base_model_state_dict
from peft.checkpoint.card import model_card
from peft.checkpoint.files import infer_device, load_peft_weights, read_adapter, write_adapter
from peft.checkpoint.state import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "model_card",
    "read_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "write_adapter",
]
