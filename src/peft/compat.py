"""Old import paths: the table says where each name that was once importable from a path lives now.

`install` makes them importable, and lets what lies below a folder load when it is first asked for as an attribute:
`import peft; peft.tuners.lora.layer.Linear` works. Nothing is imported before it is asked for, and nothing in this
library uses them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import MethodType, ModuleType
from typing import Any

from peft.registry import METHODS, PeftType
from peft.target_tables import DEFAULT_TARGETS


def _at(home: str, names: str) -> dict[str, str]:
    """`names`, divided by blanks, as a mapping to `home:name`; `old=new` where the name is another there now."""
    pairs = (name.partition("=") for name in names.split())
    return {old: f"{home}:{new or old}" for old, _, new in pairs}


_TYPES = _at("peft.registry", "PeftType TaskType register_peft_method")
_ERRORS = _at("peft.errors", "NoMatchingPeftModuleError PeftError")
_WARNING = _at("peft.errors", "PeftWarning")
_CONSTANTS = {
    **_at("peft.config", "CONFIG_NAME"),
    **_at(
        "peft.tuners.prompts.cache",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value",
    ),
    **_at("peft.hub", "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"),
    **_at("peft.checkpoint.state", "EMBEDDING_LAYER_NAMES"),
    **_at("peft.core.targets", "DUMMY_TARGET_MODULES INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR"),
    **_at("peft.integrations.backends", "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES"),
    **_at("peft.target_tables", "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING=FEEDFORWARD_TARGETS"),
    **{
        f"TRANSFORMERS_MODELS_TO_{method.value.replace('_', '')}_TARGET_MODULES_MAPPING": (
            f"peft.target_tables:DEFAULT_TARGETS[{method.value}]"
        )
        for method in PeftType
        if method.value in DEFAULT_TARGETS
    },
}
_STATE = _at(
    "peft.checkpoint",
    "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict"
    " set_peft_model_state_dict",
)
_WRAPPERS = {
    **_at("peft.core.auxiliary", "AuxiliaryTrainingWrapper ModulesToSaveWrapper"),
    **_at("peft.core.tokens", "TrainableTokensWrapper"),
}
_TRAINING = _at("peft.integrations.training", "cast_mixed_precision_params prepare_model_for_kbit_training")
_LINEAR = _at("peft.legacy", "check_adapters_to_merge transpose _get_in_out_features=get_in_out_features")
_UNUSED = _at(
    "peft.legacy",
    "SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING"
    " check_file_exists_on_hf_hub match_target_against_key str_to_bool torch_load transpose"
    " _freeze_adapter=freeze_adapter _get_batch_size=get_batch_size",
)
_OTHER = {
    **_CONSTANTS,
    **_UNUSED,
    **_WRAPPERS,
    **_TRAINING,
    **_at("peft.checkpoint", "infer_device"),
    **_at("peft.core.targets", "get_pattern_key"),
    **_at("peft.core.walk", "_get_submodules=get_submodules"),
    **_at("peft.integrations.backends", "get_quantization_config id_tensor_storage"),
    **_at("peft.integrations.fsdp", "fsdp_auto_wrap_policy"),
    **_at("peft.integrations.transformers", "shift_tokens_right"),
    **_at("peft.integrations.backends", "is_gptqmodel_available is_xpu_available"),
}
_BACKENDS = _at(
    "peft.integrations.backends",
    "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available"
    " is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available"
    " is_te_pytorch_available is_torchao_available is_xpu_available",
)
_MODELS = _at(
    "peft.tasks",
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM"
    " PeftModelForSequenceClassification PeftModelForTokenClassification",
)

#: old path -> name there -> where it lives now
OLD_PATHS: dict[str, dict[str, str]] = {
    "peft.import_utils": _BACKENDS,
    "peft.mapping": {
        **_at("peft.mapping_func", "get_peft_model"),
        **_at("peft.config", "get_peft_config"),
        **_at("peft.functional", "inject_adapter_in_model"),
        **_at("peft.tasks", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"),
        **_at(
            "peft.registry",
            "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING"
            " PEFT_TYPE_TO_TUNER_MAPPING",
        ),
    },
    "peft.mixed_model": _at("peft.mixed", "PeftMixedModel"),
    "peft.peft_model": {
        **_MODELS,
        **_STATE,
        **_at("peft.core.status", "TunerLayerStatus TunerModelStatus get_layer_status get_model_status"),
    },
    "peft.tuners._buffer_dict": _at("peft.legacy", "BufferDict"),
    "peft.tuners.mixed": _at("peft.mixed", "MixedModel"),
    "peft.tuners.mixed.model": _at("peft.mixed", "MixedModel"),
    "peft.tuners.tuners_utils": {
        **_at("peft.core.layer", "BaseTunerLayer=AdapterLayer"),
        **_at("peft.core.tuner", "BaseTuner"),
        **_at("peft.core.targets", "check_target_module_exists"),
        **_at(
            "peft.legacy",
            "DUMMY_MODEL_CONFIG SEQ_CLS_HEAD_NAMES BufferDict onload_layer _ExcludedModule=ExcludedModule"
            " _maybe_include_all_linear_layers=maybe_include_all_linear_layers",
        ),
        **_LINEAR,
        **_CONSTANTS,
        **_ERRORS,
        **_WARNING,
        **_TYPES,
        **_WRAPPERS,
        **_at("peft.config", "PeftConfig"),
        **_at("peft.core.walk", "_get_submodules=get_submodules"),
        **_at("peft.functional", "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"),
    },
    "peft.tuners.adamss.asa_callback": _at("peft.integrations.training", "AdamssAsaCallback"),
    "peft.tuners.cartridge.utils": _at(
        "peft.prompt_caches",
        "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text"
        " prompt_embeddings_from_past_key_values",
    ),
    "peft.tuners.lora.arrow": _at("peft.lora_tools.arrow", "create_arrow_model"),
    "peft.tuners.lora.corda": _at("peft.tuners.lora.preprocess", "CordaEigens preprocess_corda"),
    "peft.tuners.lora.dora": {
        **_at("peft.tuners.lora.variants.dora", "DoraLinearLayer=Magnitude"),
        **_at("peft.integrations.backends", "dequantize_module_weight"),
    },
    "peft.tuners.lora.loraga": _at("peft.tuners.lora.preprocess", "preprocess_loraga"),
    "peft.tuners.lora.conversion": _at("peft.lora_tools.convert", "convert_to_lora save_as_lora"),
    **{
        f"peft.tuners.xlora{part}": _at(
            "peft.xlora",
            "XLoraClassifier XLoraConfig XLoraEmbeddingLayer XLoraLayer XLoraLinearLayer XLoraModel",
        )
        for part in ("", ".classifier", ".config", ".layer", ".model")
    },
    **{
        f"peft.tuners.lora.{path}": _at("peft.tuners.lora.quantised", names)
        for path, names in {
            "aqlm": "AqlmLoraLinear dispatch_aqlm=dispatch",
            "awq": "AwqLoraLinear dispatch_awq=dispatch",
            "bnb": "Linear4bit Linear8bitLt dispatch_bnb_4bit=dispatch dispatch_bnb_8bit=dispatch",
            "eetq": "EetqLoraLinear dispatch_eetq=dispatch",
            "gptq": "GPTQLoraLinear dispatch_gptq=dispatch",
            "hqq": "HqqLoraLinear dispatch_hqq=dispatch",
            "inc": "IncLoraLinear dispatch_inc=dispatch",
            "te": "TeLinear dispatch_transformer_engine=dispatch",
            "torchao": "TorchaoLoraLinear dispatch_torchao=dispatch",
        }.items()
    },
    "peft.tuners.lora.tp_layer": _at("peft.tuners.lora.parallel", "LoraParallelLinear"),
    "peft.utils": {
        **_at("peft.lora_tools.loftq", "replace_lora_weights_loftq"),
        **_OTHER, **_STATE, **_TYPES, **_ERRORS, **_WARNING,
    },
    "peft.utils.constants": {**_CONSTANTS, **_UNUSED, **_at("peft.legacy", "DUMMY_MODEL_CONFIG")},
    "peft.utils.error": _ERRORS,
    "peft.utils.loftq_utils": _at("peft.lora_tools.loftq", "replace_lora_weights_loftq"),
    "peft.utils.hotswap": _at(
        "peft.lora_tools.hotswap",
        "CONFIG_KEYS_TO_CHECK check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict"
        " prepare_model_for_compiled_hotswap",
    ),
    "peft.utils.integrations": {
        **_at("peft.legacy", "check_deepspeed_zero3_enabled dequantize_bnb_weight get_layer_device_map"),
        **_at(
            "peft.integrations.backends",
            "dequantize_module_weight gather_params_ctx get_bnb_param_type init_empty_weights",
        ),
    },
    "peft.utils.merge_utils": _at(
        "peft.ops.merging",
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_prune prune task_arithmetic ties",
    ),
    "peft.utils.other": _OTHER,
    "peft.utils.peft_types": _TYPES,
    "peft.utils.save_and_load": _STATE,
    "peft.utils.transformers_weight_conversion": {
        **_at(
            "peft.integrations.transformers",
            "build_peft_weight_mapping convert_peft_adapter_state_dict_for_transformers"
            " convert_peft_config_for_transformers",
        ),
        **_at("transformers.conversion_mapping", "get_model_conversion_mapping"),
    },
    "peft.utils.warning": _WARNING,
}

#: names that files of today once had, and that nothing in them needs
MORE_NAMES: dict[str, dict[str, str]] = {
    "peft.auto": _MODELS,
    "peft.helpers": {
        **_at("peft.core.layer", "BaseTunerLayer=AdapterLayer"),
        **_at("peft.lora_tools.arrow", "create_arrow_model"),
        **_at("peft.lora_tools.loftq", "replace_lora_weights_loftq"),
    },
    "peft.tuners.lora": {**_BACKENDS, **_at("peft.lora_tools.arrow", "create_arrow_model")},
    "peft.tuners.lora.layer": {
        **_LINEAR,
        **_at("peft.tuners.lora.kinds", "Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper"),
        **_at("peft.legacy", "BufferDict VARIANT_KWARG_KEYS _LoraParameterProxy=Added"),
        **_at("peft.core.layer", "BaseTunerLayer=AdapterLayer"),
        **_at(
            "peft.integrations.backends",
            "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES dequantize_module_weight gather_params_ctx get_bnb_param_type",
        ),
    },
    "peft.tuners.lora.model": {
        **_at("peft.core.layer", "BaseTunerLayer=AdapterLayer"),
        **_at("peft.legacy", "_freeze_adapter=freeze_adapter"),
        **_at("peft.core.walk", "_get_submodules=get_submodules"),
    },
}

#: a path that was a method's folder, or a file in it -> the file that has all of the method
METHOD_PATHS = {
    f"peft.tuners.{method.module.rpartition('.')[2]}{part}": method.module
    for method in METHODS.values()
    if not method.module.startswith(("peft.tuners.lora", "peft.tuners.shadow", "peft.xlora"))
    for part in ("", ".config", ".layer", ".model")
}

#: methods that classes once had, and that nothing here calls; class -> name there -> a function of its objects
OLD_METHODS: dict[str, dict[str, str]] = {
    "peft.core.layer:AdapterLayer": _at(
        "peft.legacy",
        "_cast_input_dtype=cast_input_dtype _check_forward_args=check_forward_args"
        " _mixed_batch_forward=mixed_batch_forward _move_adapter_to_device_of_base_layer=move_adapter_to_base_layer",
    ),
    "peft.tuners.lora.kinds:ParamWrapper": _at("peft.legacy", "_activate_lora=activate_lora"),
    "peft.tuners.lora.variants.dora:Magnitude": _at("peft.legacy", "update_layer=measure_lengths"),
}
_WITH_OLD_METHODS = frozenset(path.partition(":")[0] for path in OLD_METHODS)

#: folders whose modules load on attribute access
FOLDERS = ("peft.optimizers", "peft.tuners", "peft.tuners.lora", "peft.tuners.shadow")


def submodule(package: str, name: str) -> ModuleType:
    """The module `name` of a package, imported if need be.

    Raises:
        AttributeError: there is no such module.
    """
    path = f"{package}.{name}"
    if not name.startswith("__"):
        try:
            return import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules.get(package))


def _value_at(home: str) -> Any:
    """What stands at `module:name` or `module:name[key]`."""
    module, _, name = home.partition(":")
    name, _, key = name.partition("[")
    value = getattr(import_module(module), name)
    return value[key.removesuffix("]")] if key else value


def _put_at(home: str, value: Any) -> None:
    """Puts something there, and wherever it has been imported to."""
    module, _, name = home.partition(":")
    name, _, key = name.partition("[")
    if key:
        getattr(import_module(module), name)[key.removesuffix("]")] = value
        return
    before = getattr(import_module(module), name)
    setattr(import_module(module), name, value)
    for path, loaded in list(sys.modules.items()):  # those that have imported it call the new one, too
        if path.partition(".")[0] == "peft" and vars(loaded).get(name) is before:
            setattr(loaded, name, value)


class OldPath(ModuleType):
    """A module without names of its own: reading or setting one does so where it lives; deleting undoes the setting.

    So what replaces a function under its old path replaces it for this library too.
    """

    def _home(self, name: str) -> str:
        """Where a name lives, as the table has it; empty if nowhere."""
        path = self.__name__
        if path in OLD_PATHS:
            return OLD_PATHS[path].get(name, "")
        below = f"{path}.{name}"
        if name.startswith("__") or below in OLD_PATHS or below in METHOD_PATHS:
            return ""
        return f"{METHOD_PATHS[path]}:{name}"

    def __getattr__(self, name: str) -> Any:
        home = self._home(name)
        return _value_at(home) if home else submodule(self.__name__, name)

    def __setattr__(self, name: str, value: Any) -> None:
        home = self._home(name)
        # What the import system sets, such as submodules, belongs to this module itself.
        if home and not isinstance(value, ModuleType):
            self._before(name).append(_value_at(home))
            _put_at(home, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        home = self._home(name)
        if home and name not in self.__dict__ and self._before(name):
            # As of a module without a name of its own: what shines through when the replacement is taken away.
            _put_at(home, self._before(name).pop())
        else:
            super().__delattr__(name)

    def _before(self, name: str) -> list[Any]:
        """The values that were replaced under this name, the latest last."""
        return self.__dict__.setdefault("__replaced__", {}).setdefault(name, [])

    def __dir__(self) -> list[str]:
        names = OLD_PATHS.get(self.__name__)
        return sorted(
            {*super().__dir__(), *(dir(import_module(METHOD_PATHS[self.__name__])) if names is None else names)}
        )


class OldMethod:
    """A method of old: looked up when somebody asks for it."""

    def __init__(self, home: str):
        self.home = home

    def __get__(self, instance: Any, owner: type) -> Any:
        function = _value_at(self.home)
        return function if instance is None else MethodType(function, instance)


class FileLoader(SourceFileLoader):
    """Loads a file as it is; then what is below it, and what it once had, can be asked for as an attribute."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        own = module.__dict__.get("__getattr__")

        def load(name: str) -> Any:
            if own is not None:
                try:
                    return own(name)
                except AttributeError:
                    pass
            more = MORE_NAMES.get(module.__name__, {})
            return _value_at(more[name]) if name in more else submodule(module.__name__, name)

        module.__dict__["__getattr__"] = load
        for path, methods in OLD_METHODS.items():
            home, _, kind = path.partition(":")
            for name, function in methods.items() if home == module.__name__ else ():
                setattr(module.__dict__[kind], name, OldMethod(function))


class OldPathFinder:
    """Finds the old paths, and the files that have names or modules of old, for `sys.meta_path`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        one_file = METHOD_PATHS.get(name) == name
        if name in FOLDERS or one_file or name in MORE_NAMES or name in _WITH_OLD_METHODS:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and one_file and spec.submodule_search_locations is None:
                # The file as it is, but as a package, so that what is below it is looked for at all.
                spec.submodule_search_locations = []
            if spec is not None and type(spec.loader) is SourceFileLoader:
                spec.loader = FileLoader(spec.loader.name, spec.loader.path)
            return spec
        if name in OLD_PATHS or name in METHOD_PATHS:
            spec = ModuleSpec(name, self, origin=__file__, is_package=True)  # type: ignore[arg-type]
            spec.has_location = True
            return spec
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return OldPath(spec.name, f"An old path; see `{__name__}` for where its names live now.")

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Makes the old paths importable."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.insert(0, OldPathFinder())
