"""Adapters in and out of files: their tensors and names, the two files on disk, the model card, the hub.

This room knows configurations, the mechanism in `core` and the methods; it knows no model class.
"""

from peft.checkpoint.base_state import get_base_model_state_dict as get_base_model_state_dict
from peft.checkpoint.base_state import set_base_model_state_dict as set_base_model_state_dict
from peft.checkpoint.card import model_card as model_card
from peft.checkpoint.files import infer_device as infer_device
from peft.checkpoint.files import load_peft_weights as load_peft_weights
from peft.checkpoint.files import read_adapter as read_adapter
from peft.checkpoint.files import write_adapter as write_adapter
from peft.checkpoint.state import get_peft_model_state_dict as get_peft_model_state_dict
from peft.checkpoint.state import set_peft_model_state_dict as set_peft_model_state_dict
