"""Names that other packages import from old paths and that nothing here needs; `compat` says where each was."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import NormOp, base_op
from peft.core.layer import AdapterLayer
from peft.core.slots import Buffers
from peft.core.storage import onloaded, storage_of
from peft.core.targets import ALL_LINEAR, CLASSIFIER_NAMES, named_targets
from peft.errors import warn
from peft.integrations.backends import get_bnb_param_type

#: what transformers calls the file
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
#: heads of classifiers, which "all-linear" leaves out
SEQ_CLS_HEAD_NAMES = sorted(CLASSIFIER_NAMES)
#: what stands for the configuration of a model that has none
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
#: keyword arguments of a forward pass that are for LoRA's variants alone; those of this library see for themselves
VARIANT_KWARG_KEYS = ["alora_offsets"]

BufferDict = Buffers
#: `torch.load` that reads tensors and nothing that could run
torch_load = partial(torch.load, weights_only=True)


class ExcludedModule:
    """What `check_target_module_exists` once gave for modules in `exclude_modules`; it gives None now."""

    def __bool__(self) -> bool:
        return False


# ---- weights


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The transposed weight if `fan_in_fan_out`, else the weight itself; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def dequantize_bnb_weight(weight: Tensor, state: Any = None) -> Tensor:
    """A weight that bitsandbytes holds in 4 or 8 bits, as a plain tensor.

    Args:
        weight: the packed parameter.
        state: what holds the scales (`SCB`) of 8-bit rows; the parameter itself if None.

    Raises:
        TypeError: it is no parameter of bitsandbytes.
        ValueError: 8-bit rows without scales.
    """
    kind = get_bnb_param_type(weight)  # type: ignore[arg-type]
    if not kind:
        raise TypeError(f"Only parameters of bitsandbytes can be dequantised, got a {type(weight).__name__}.")
    functional, packed = sys.modules["bitsandbytes.functional"], weight.data
    if kind == "4bit":
        return functional.dequantize_4bit(packed, weight.quant_state)  # type: ignore[attr-defined]
    scales = next((found for holder in (state, weight) if (found := getattr(holder, "SCB", None)) is not None), None)
    if scales is None:
        raise ValueError("The scales (SCB) of 8-bit rows are neither in `state` nor in the parameter.")
    return functional.int8_vectorwise_dequant(packed, scales)


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """While it lasts, the weights of a layer, and of what is inside, that accelerate offloads are there."""
    with ExitStack() as stack:
        for module in layer.modules():
            stack.enter_context(onloaded(module))
        yield


def get_in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """What a module says of the width of its input and output; both None, with a warning, where it says nothing."""
    widths = {"in_features": "out_features", "in_channels": "out_channels", "num_embeddings": "embedding_dim"}
    for ins, outs in widths.items():
        if hasattr(module, ins) and hasattr(module, outs):
            return getattr(module, ins), getattr(module, outs)
    op = base_op(module)
    if op is None or isinstance(op, NormOp):
        warn(f"The widths of a {type(module).__name__} are not known.")
        return None, None
    return op.in_features, op.out_features


# ---- adapters


def check_adapters_to_merge(module: AdapterLayer, adapter_names: Sequence[str] | str | None = None) -> list[str]:
    """Which adapters a merge of `adapter_names` (None: of the active ones) has to add; a warning for those that are."""
    return module.names_to_merge(adapter_names)


def maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """The configuration with the names of all linear layers, head aside, for "all-linear"; others as they are."""
    if getattr(peft_config, "target_modules", None) == ALL_LINEAR:
        peft_config.target_modules = named_targets(peft_config, model)
    return peft_config


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Makes every parameter with the adapter's name in its own untrainable."""
    for name, parameter in model.named_parameters():
        if adapter_name in name:
            parameter.requires_grad_(False)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """Whether a regular expression fits a whole name."""
    return re.fullmatch(target_pattern, key)


# ---- methods of layers


def cast_input_dtype(layer: AdapterLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the dtype of an adapter's weight."""
    return x.to(dtype)


def check_forward_args(layer: AdapterLayer, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Raises ValueError where `adapter_names` are not one for each sample, or adapters are merged."""
    names = kwargs.get("adapter_names")
    if names is not None and len(names) != len(x):
        raise ValueError(f"adapter_names has length {len(names)}, and there are {len(x)} samples; one each is needed.")
    if names is not None and layer.merged:
        raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")


def mixed_batch_forward(layer: AdapterLayer, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
    """The layer's output where each sample has an adapter of its own."""
    return layer(x, *args, adapter_names=adapter_names, **kwargs)


def move_adapter_to_base_layer(layer: AdapterLayer, adapter_name: str, device: torch.device | None = None) -> None:
    """Moves an adapter to the device of the base weight, or to `device`."""
    layer.move(adapter_name, layer.place()[0] if device is None else device)


@contextmanager
def activate_lora(layer: AdapterLayer, active_adapters: Sequence[str]) -> Iterator[None]:
    """While it lasts, the parameter of the base module is as these adapters make it."""
    names = [name for name in active_adapters if layer.has(name)]
    base, own = layer.get_base_layer(), layer.op.weight_name
    held = dict(base._parameters)
    if names:
        weight = layer.effective(names)[0]
        del base._parameters[own]
        base.__dict__[own] = weight
    try:
        yield
    finally:
        base.__dict__.pop(own, None)
        base._parameters.clear()
        base._parameters.update(held)


class Added(nn.Module):
    """W -> W + `delta_weight`, as a parametrisation of a parameter."""

    def __init__(self, delta_weight: Tensor):
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: Tensor) -> Tensor:
        return W + self.delta_weight


def measure_lengths(
    magnitude: Any, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, **kwargs: Any
) -> None:
    """Makes DoRA's magnitudes the lengths of the rows of W + scaling B A, for a linear layer."""
    op: Any = base_op(base_layer)
    with torch.no_grad(), onloaded(base_layer):
        weight = op.matrix(storage_of(base_layer, op.weight_name).read(base_layer, op.weight_name)).to(lora_A.dtype)
        lengths = torch.linalg.norm(weight + scaling * (lora_B @ lora_A), dim=1)
    magnitude.weight = nn.Parameter(lengths)


# ---- surroundings


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under DeepSpeed ZeRO-3."""
    # Without transformers loaded, nothing can have set it up.
    integration = sys.modules.get("transformers.integrations.deepspeed")
    return integration is not None and bool(integration.is_deepspeed_zero3_enabled())


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **hub: Any) -> bool | None:
    """Whether a repository on the hub has a file; None, with a warning, where that cannot be found out.

    Args:
        repo_id: the repository.
        filename: the file.
        hub: what `huggingface_hub.file_exists` takes.
    """
    from huggingface_hub import file_exists

    try:
        return file_exists(repo_id, filename, **hub)
    except Exception as error:
        warn(f"Whether {repo_id!r} has {filename!r} cannot be found out: {error}")
        return None


def str_to_bool(value: str) -> int:
    """1 for y, yes, t, true, on and 1, 0 for n, no, f, false, off and 0, in any case.

    Raises:
        ValueError: anything else.
    """
    words = dict.fromkeys(("y", "yes", "t", "true", "on", "1"), 1)
    words |= dict.fromkeys(("n", "no", "f", "false", "off", "0"), 0)
    if value.lower() not in words:
        raise ValueError(f"{value!r} is neither true nor false; write one of {', '.join(words)}.")
    return words[value.lower()]


def get_layer_device_map(model: Any) -> dict[int, int | str] | None:
    """The device of each transformer layer of a model that accelerate has spread out; None for other models.

    A map of one entry is for the whole model; so each layer has its device.
    """
    spread = getattr(model, "hf_device_map", None)
    if not spread:
        return None
    if len(spread) == 1:
        only = next(iter(spread.values()))
        return dict.fromkeys(range(model.config.get_text_config().num_hidden_layers), only)
    found: dict[int, int | str] = {}
    for name, device in spread.items():
        index = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if index:
            found.setdefault(int(index[1]), device)
    return found


def get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The number of samples.

    Raises:
        ValueError: there are neither ids nor vectors.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("input_ids or inputs_embeds are needed, and neither was given.")
    return given.shape[0]
