"""Megatron's parallel linear layers as LoRA's factors.

Megatron shares a weight out among the processes of a tensor-parallel group (arXiv:1909.08053), and so is a LoRA on it:
on a `RowParallelLinear`, which holds columns of the weight, A holds columns too, and B is whole on each process; on a
`ColumnParallelLinear`, which holds rows, so does B, and A is whole.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import ParallelLinearOp
from peft.tuners.lora.config import LoraConfig

#: what `megatron_config` may hold
_IN_FILES = (str, int, float, list, tuple, dict, type(None))


def check_megatron(config: LoraConfig) -> None:
    """Raises where the configuration asks for Megatron's layers and they cannot be made.

    Raises:
        ValueError: `megatron_core` is no part of Megatron, or `megatron_config` has what that does not know, or what
            cannot be saved.
        ImportError: Megatron is not installed.
    """
    if not config.megatron_config:
        return
    transformer_config(config)
    objects = [name for name, value in config.megatron_config.items() if not isinstance(value, _IN_FILES)]
    if objects:
        raise ValueError(
            f"megatron_config is saved with the adapter, so it cannot hold objects of other kinds:"
            f" {', '.join(objects)}. Leave them out; factors are made in float32 and come to the dtype that"
            " autocast_adapter_dtype asks for."
        )


def check_parallel(config: LoraConfig, key: str, module: Any, op: ParallelLinearOp) -> None:
    """Raises ValueError where a LoRA cannot go on a parallel layer."""
    what = f"{key!r}, a {type(module).__name__} of Megatron,"
    if not config.megatron_config:
        raise ValueError(f"{what} needs megatron_config, the settings of Megatron's TransformerConfig as a dictionary.")
    if config.lora_bias:
        raise ValueError(f"lora_bias=True is not supported for {what.rstrip(',')}.")
    layers = _part(config, "tensor_parallel")
    if not isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
        raise ValueError(f"{what} is not of megatron_core={config.megatron_core!r} but of {type(module).__module__}.")
    asked, found = (bool(settings.sequence_parallel) for settings in (transformer_config(config), module.config))
    if asked != found:
        raise ValueError(f"megatron_config says sequence_parallel={asked}, but {what} has sequence_parallel={found}.")
    if getattr(module, "is_expert", False) and op.processes > 1:
        raise ValueError(
            f"{what} is an expert that {op.processes} processes share. Its output is summed up outside of it, so the"
            " gradients of a factor that is whole on each of them would differ; use an expert_tensor_parallel_size of"
            " 1, or leave the experts out of target_modules."
        )


def transformer_config(config: LoraConfig) -> Any:
    """Megatron's own configuration, made of `megatron_config`."""
    kind = _part(config, "transformer.transformer_config").TransformerConfig
    try:
        return kind(**(config.megatron_config or {}))
    except (TypeError, ValueError, AssertionError) as error:
        asked = config.megatron_config
        raise ValueError(f"megatron_config={asked} does not make a TransformerConfig: {error}") from error


def _part(config: LoraConfig, name: str) -> Any:
    """A module of Megatron's."""
    core = config.megatron_core or ""
    # The configuration may be somebody else's file, and importing runs code.
    if not core.startswith("megatron."):
        raise ValueError(f"megatron_core={config.megatron_core!r} must be a part of Megatron, such as 'megatron.core'.")
    try:
        return import_module(f"{core}.{name}")
    except ImportError as error:
        raise ImportError(
            f"megatron_config asks for LoRA on Megatron's parallel layers, but {core}.{name} cannot be imported"
            f" ({error}). Install megatron-core, or leave megatron_config out."
        ) from error


def parallel_factor(config: LoraConfig, base: Any, in_features: int, out_features: int) -> nn.Module:
    """A layer of another size [out, in] that is shared out as `base` is; its values are open."""
    settings = copy.copy(transformer_config(config))
    # Made on the CPU and in full precision as all adapters are; the mechanism moves it.
    settings.use_cpu_initialization, settings.params_dtype = True, torch.float32
    # Without it, Megatron's marks are missing: which parameters the processes share.
    settings.perform_initialization = True
    # They need buffers that Megatron has for the parameters of its own models only.
    settings.gradient_accumulation_fusion = settings.defer_embedding_wgrad_compute = False
    # Versions differ in whether they know these.
    more = {name: value for name in ("is_expert", "tp_group") if (value := getattr(base, name, None))}
    layers = _part(config, "tensor_parallel")
    if isinstance(base, layers.RowParallelLinear):
        made = layers.RowParallelLinear
        more |= {"input_is_parallel": base.input_is_parallel, "skip_bias_add": True}
    else:
        made = layers.ColumnParallelLinear
        more |= {"gather_output": base.gather_output}
    return made(in_features, out_features, config=settings, init_method=_leave_open, bias=False, **more)


def _leave_open(weight: Tensor) -> None:
    """Start values come later."""


def mark_whole(factor: nn.Linear, base: Any) -> nn.Linear:
    """Tells Megatron's training how the gradient of a factor that each process holds has to be summed up."""
    weight: Any = factor.weight
    # With sequence parallelism each process has seen some of the tokens.
    weight.sequence_parallel = bool(base.sequence_parallel)
    weight.allreduce = getattr(base.weight, "allreduce", True)
    return factor


def own_part(whole: Tensor, base: Any, op: ParallelLinearOp) -> Tensor:
    """What this process holds of a factor that is shared out as `base` is."""
    if op.processes == 1:
        return whole
    group = getattr(base, "tp_group", None)
    if group is not None:
        rank = group.rank()
    else:  # older versions have one group, and know it by themselves
        core = type(base).__module__.partition(".tensor_parallel")[0]
        rank = import_module(f"{core}.parallel_state").get_tensor_model_parallel_rank()
    return whole.chunk(op.processes, dim=1 if op.shares_input else 0)[rank]
