"""Parameter-efficient fine-tuning: train a small part of a large model, save a few megabytes, load them back.

Public names are loaded when they are first used, so `import peft` costs next to nothing.
"""

from importlib import import_module
from typing import Any

from peft import compat
from peft.registry import METHODS
from peft.version import __version__

#: where each public name lives; the names of the methods come from their table
_HOMES: dict[str, str] = {
    name: home
    for home, names in {
        "peft.auto": (
            "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering"
            " AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"
        ),
        "peft.config": "PeftConfig PromptLearningConfig get_peft_config",
        "peft.registry": (
            "TaskType PeftType PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING"
        ),
        "peft.errors": "NoMatchingPeftModuleError PeftError PeftWarning",
        "peft.mapping_func": "get_peft_model",
        "peft.mixed": "PeftMixedModel",
        "peft.tasks": (
            "PeftModel MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModelForCausalLM PeftModelForFeatureExtraction"
            " PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification"
            " PeftModelForTokenClassification"
        ),
        "peft.functional": "inject_adapter_in_model",
        "peft.helpers": "KappaTuneSelector find_kappa_target_modules",
        "peft.lora_tools.arrow": "create_arrow_model",
        "peft.lora_tools.loftq": "replace_lora_weights_loftq",
        "peft.tuners.prompts.cache": (
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value"
        ),
        "peft.prompt_caches": (
            "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text"
            " prompt_embeddings_from_past_key_values"
        ),
        "peft.core.status": "get_layer_status get_model_status",
        "peft.lora_tools.convert": "convert_to_lora save_as_lora",
        "peft.lora_tools.extract": "extract_lora",
        "peft.checkpoint": (
            "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict"
            " set_peft_model_state_dict"
        ),
        "peft.integrations.training": "cast_mixed_precision_params prepare_model_for_kbit_training",
        "peft.integrations.transformers": "shift_tokens_right",
    }.items()
    for name in names.split()
}
_HOMES |= {name: method.module for method in METHODS.values() for name in method.public_names}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    return compat.submodule("peft", name)  # submodules count as attributes, imported or not


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


compat.install()
