"""Which optional packages are installed, and how they hold weights, for packages that ask this library about it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from peft.core.storage import onloaded, storage_of

#: dtypes that quantised layers may compute in
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: names of the 8-bit float dtypes, which adapters are not kept in; a version of torch may lack some
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


@cache
def _is_installed(package: str) -> bool:
    # Looking for `a.b` imports `a`, so `a` must be there.
    return find_spec(package.partition(".")[0]) is not None and find_spec(package) is not None


#: whether a package is installed; looked for when it is first asked
is_aqlm_available = partial(_is_installed, "aqlm")
is_bnb_available = partial(_is_installed, "bitsandbytes")
is_bnb_4bit_available = is_bnb_available
is_diffusers_available = partial(_is_installed, "diffusers")
is_eetq_available = partial(_is_installed, "eetq")
is_gptqmodel_available = partial(_is_installed, "gptqmodel")
is_hqq_available = partial(_is_installed, "hqq")
is_inc_available = partial(_is_installed, "neural_compressor")
is_optimum_available = partial(_is_installed, "optimum")
is_te_available = partial(_is_installed, "transformer_engine")
is_te_pytorch_available = partial(_is_installed, "transformer_engine.pytorch")
is_torchao_available = partial(_is_installed, "torchao")


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The quantisation settings of a transformers model that is quantised with `method`; None if it is not."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    return settings if getattr(model, "quantization_method", None) == method else None


def get_bnb_param_type(param: nn.Parameter) -> Literal[False, "4bit", "8bit"]:
    """How bitsandbytes packs a parameter; False if it does not."""
    kinds: dict[str, Literal["4bit", "8bit"]] = {"Params4bit": "4bit", "Int8Params": "8bit"}
    return kinds.get(type(param).__name__, False)


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a module as a plain floating tensor; the very parameter where it is one.

    Args:
        module: a base module, or an adapter layer, whose base module is taken.

    Raises:
        TypeError: the weight is held in a way that cannot be read.
    """
    layer: Any = module
    base = layer.get_base_layer() if hasattr(module, "get_base_layer") else module
    with onloaded(base):
        return storage_of(base, "weight").read(base, "weight")


def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter],
    modifier_rank: int | None = 0,
    fwd_module: nn.Module | None = None,
) -> AbstractContextManager[Any]:
    """While it lasts, parameters that DeepSpeed ZeRO-3 shards are whole; without it, nothing changes.

    Args:
        param: one parameter or several.
        modifier_rank: the rank whose changes are kept; None where there are none.
        fwd_module: the module whose forward needs them.
    """
    # Sharding needs DeepSpeed loaded, so there is no need to import it in order to find out.
    deepspeed = sys.modules.get("deepspeed")
    params = [param] if isinstance(param, Tensor) else list(param)
    if deepspeed is None or not any(hasattr(p, "ds_id") for p in params):
        return nullcontext()
    return deepspeed.zero.GatheredParameters(params, modifier_rank=modifier_rank, fwd_module=fwd_module)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Modules made meanwhile hold parameters without memory, on the meta device.

    Args:
        include_buffers: whether buffers, and any tensor made meanwhile, are on the meta device as well.
    """
    if include_buffers:
        with torch.device("meta"):
            yield
        return

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None:
            return None
        return type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()
