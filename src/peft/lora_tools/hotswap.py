"""Another LoRA in the place of one that is loaded: the same tensors with new values, for which nothing is compiled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from peft.checkpoint.files import read_adapter
from peft.checkpoint.state import Fit, Location, config_of
from peft.config import PeftConfig, build_config
from peft.core.combine import fill
from peft.core.targets import ROOT, target_name
from peft.core.walk import in_files, layers_of
from peft.core.whole import alone, contents_kept
from peft.errors import warn
from peft.lora_tools.formats import as_pattern
from peft.registry import PeftType, value_of
from peft.tuners.lora.base import TiedFactor
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.factors import FACTOR_KEYS, adapter_rank, as_stacks, block_count, block_rank, load, store
from peft.tuners.lora.layer import LoraLayer

#: settings that decide how an adapter's tensors are used, beyond its scale, and so have to be the same
CONFIG_KEYS_TO_CHECK = {
    PeftType.LORA: (
        "use_rslora", "lora_dropout", "bias", "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens",
        "arrow_config", "velora_config", "kasa_config", "monteclora_config",
    )
}  # fmt: skip


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Checks that an adapter with one configuration can take the place of one with the other.

    Ranks, alphas, their patterns and the target modules may differ.

    Raises:
        ValueError: the method is not LoRA, or settings differ that decide how its tensors are used.
    """
    types = [value_of(config.peft_type) for config in (config0, config1)]
    if types[0] != types[1]:
        raise ValueError(f"Adapters of different methods cannot take each other's place: {types[0]} and {types[1]}.")
    if types[0] != "LORA":
        raise ValueError(f"Hot swapping is for LORA adapters only, not for {types[0]}.")
    for key in CONFIG_KEYS_TO_CHECK[PeftType.LORA]:
        values = [getattr(config, key) for config in (config0, config1)]
        if values[0] != values[1]:
            raise ValueError(f"Adapters cannot replace each other: their {key} are {values[0]!r} and {values[1]!r}.")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replaces a loaded LoRA by a saved one, in place: the adapter keeps its name, and a compiled model its code.

    Layers that the new adapter is not on get a LoRA that does nothing. All is checked before anything changes.

    Args:
        model: a model with the adapter, compiled or not.
        model_name_or_path: the new adapter: a folder, or a repository id on the hub.
        adapter_name: the adapter to replace.
        torch_device: where the new tensors are read to.
        kwargs: `subfolder`, `key_mapping`; `revision`, `token`, `cache_dir`, ... for the hub.

    Raises:
        ValueError: the methods or settings differ, the adapter is merged, or a compiled model has no room for the rank.
        RuntimeError: the new adapter is on layers that the old one is not on, or its shapes are others.
        KeyError: there is no such adapter.
    """
    content, tensors = read_adapter(model_name_or_path, kwargs.pop("subfolder", None), device=torch_device, **kwargs)
    config = build_config(content, model_name_or_path)
    check_hotswap_configs_compatible(config_of(_plain(model), adapter_name), config)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replaces a loaded LoRA by tensors, in place; see [`hotswap_adapter`].

    Args:
        model: a model with the adapter, compiled or not.
        state_dict: the new adapter's tensors by the names that files have for them, with or without the adapter's name.
        adapter_name: the adapter to replace.
        config: the new adapter's configuration; decides the scales.
        parameter_prefix: beginning of the names of the tensors that a layer may be without.

    Raises:
        ValueError: the adapter is merged, or a compiled model has no room for the rank.
        RuntimeError: the new adapter is on layers that the old one is not on, or its shapes are others.
        KeyError: there is no such adapter.
    """
    plain = _plain(model)
    old = config_of(plain, adapter_name)
    layers = layers_of(plain, LoraLayer, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the base weights; call unmerge_adapter() first.")
    given, beside = _sorted_out(plain, state_dict, adapter_name, config, parameter_prefix)
    files = {in_files(plain, adapter_name, path): layer for path, layer in layers.items()}
    swaps = [_Swap.of(path, layer, adapter_name, given) for path, layer in files.items()]
    too_large = [swap for swap in swaps if swap.rank > swap.room]
    if too_large and _compiled(model):
        path, rank, room = too_large[0].path, too_large[0].rank, too_large[0].room
        raise ValueError(
            f"The new adapter has rank {rank} on {path!r}, and the compiled model has room for {room}. Before"
            " compiling, call prepare_model_for_compiled_hotswap(model, target_rank=...)."
        )
    written = [slot.tensor for slot, _ in beside]
    with alone(getattr(plain, "base_model", plain)), contents_kept(plain, adapter_name, written), torch.no_grad():
        for swap in too_large:
            _resize(swap.layer, adapter_name, swap.rank)
        for swap in swaps:
            fill(swap.layer, {live: swap.tensors[key] for key, live in swap.layer.key_map(adapter_name).items()})
            own = config.at(target_name(swap.path.removeprefix(ROOT), swap.layer))
            _set_alpha(swap.layer, adapter_name, own.lora_alpha, own.r)
        for slot, value in beside:
            slot.tensor.copy_(value)
        _record(old, layers, adapter_name)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Makes room in a model's LoRAs for those of other ranks and scales: swapping them in then compiles nothing anew.

    Call it when the first adapter is loaded and the model is where it will run, and before compiling. What the adapters
    do stays the same.

    Args:
        model: a model with LoRAs.
        target_rank: the highest rank of all adapters to come; the adapters are padded with zeros to it.
        config: configurations whose rank becomes `target_rank` too.
        check_compiled: what to do if the model is compiled already: raise an error, warn, or nothing.

    Raises:
        ValueError: the model is compiled or has no LoRA, or an adapter has a higher rank; the model is as before.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled must be 'error', 'warn' or 'ignore', got {check_compiled!r}.")
    if check_compiled != "ignore" and _compiled(model):
        message = "prepare_model_for_compiled_hotswap must be called before the model is compiled."
        if check_compiled == "error":
            raise ValueError(message)
        warn(message)
    plain = _plain(model)
    layers = layers_of(plain, LoraLayer)
    names = dict.fromkeys(name for layer in layers.values() for name in layer.adapter_names())
    if not names:
        raise ValueError(f"{type(plain).__name__} has no LoRA: load the first adapter before this, others after.")
    if target_rank is not None:
        for path, layer in layers.items():
            asked, ranks = f"target_rank={target_rank}", [_rank(layer, name) for name in layer.adapter_names()]
            if target_rank < max(ranks, default=0):
                raise ValueError(f"{asked} is lower than the rank of an adapter on {path!r} ({max(ranks)}).")
            if adapter_rank(layer, block_rank(layer, target_rank)) != target_rank:
                raise ValueError(f"{asked} must be a multiple of the groups of {path!r} ({block_count(layer)}).")
        for each in config.values() if isinstance(config, Mapping) else [config] if config is not None else []:
            each.r, each.rank_pattern = target_rank, dict.fromkeys(each.rank_pattern, target_rank)
    for name in names:
        layers = layers_of(plain, LoraLayer, name)
        if target_rank is not None:
            for layer in layers.values():
                _resize(layer, name, target_rank)
        for layer in layers.values():
            _set_alpha(layer, name, layer.lora_alpha[name], layer.r[name])
            scaling: Any = layer.scaling
            if not isinstance(scaling[name], Tensor):
                # A number would be compiled in.
                scaling[name] = torch.tensor(scaling[name], device=layer.factors(name)[0].device)
        _record(config_of(plain, name), layers, name)


def _rank(layer: LoraLayer, name: str) -> int:
    """The rank of an adapter as its tensors have it."""
    return adapter_rank(layer, load(layer, name)[0].shape[1])


def _plain(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of `torch.compile`."""
    return getattr(model, "_orig_mod", model)


def _compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules())


def _sorted_out(
    model: nn.Module, state_dict: Mapping[str, Tensor], name: str, config: LoraConfig, parameter_prefix: str
) -> tuple[dict[str, Tensor], list[tuple[Location, Tensor]]]:
    """The tensors of layers by the names that files have for them, and those of what is trained or saved beside.

    Raises RuntimeError where they are not those of an adapter that can take the place of adapter `name`.
    """

    def of_layer(key: str) -> bool:
        return any(part.startswith(parameter_prefix) for part in key.split("."))

    fit = Fit(model, config, name, state_dict)
    wrong = {
        "Unexpected keys": fit.unexpected,
        "Missing keys": [key for key in fit.missing() if not of_layer(key)],
        "Tensors of another shape": [key for key in fit.wrong if not of_layer(key)],  # of layers, ranks may differ
    }
    for what, keys in wrong.items():
        if keys:
            raise RuntimeError(f"The adapter cannot be swapped in. {what}: {', '.join(keys)}.")
    given = {key: value for key, value in fit.given.items() if key in fit.locations}
    return given, [(at, value) for key, value, at in fit.found if at is not None and not of_layer(key)]


class _Swap(NamedTuple):
    """What one layer gets: the new adapter's tensors, the factors with zeros up to the rank that there is room for."""

    path: str
    layer: LoraLayer
    tensors: dict[str, Tensor]
    rank: int
    room: int

    @classmethod
    def of(cls, path: str, layer: LoraLayer, name: str, given: Mapping[str, Tensor]) -> _Swap:
        """Raises RuntimeError where the tensors do not fit the layer."""
        live, now, state = layer.key_map(name), layer.factors(name), layer.state_dict()
        tensors = {key: given[f"{path}.{key}"] for key in live if f"{path}.{key}" in given}
        others = {key: tensor for key, tensor in tensors.items() if key not in FACTOR_KEYS}
        if "lora_B.bias" in live:
            others.setdefault("lora_B.bias", torch.zeros(layer.out_features))
        pair = [tensors[key] for key in FACTOR_KEYS if key in tensors]
        fits = not tensors or (len(pair) == 2 and _alike(pair, now) and not len(pair[0]) % block_count(layer))
        wrong = [key for key, tensor in others.items() if tensor.shape != state[live[key]].shape]
        if not fits or wrong or set(live) - set(FACTOR_KEYS) != set(others):
            shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items()) or "nothing"
            raise RuntimeError(
                f"The adapter cannot be swapped in. On {path!r} it has {shapes}, which does not fit {', '.join(live)}"
                f" ({' and '.join(str(tuple(tensor.shape)) for tensor in now)}) there."
            )
        room, old_a, old_b = _rank(layer, name), *load(layer, name)
        a, b = as_stacks(layer, *pair) if pair else (old_a[:, :0], old_b[..., :0])
        tensors = {**store(layer, a, b, old_a.shape[1]), **others}
        return cls(path, layer, tensors, adapter_rank(layer, a.shape[1]), room)


def _alike(new: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Whether factors differ in their ranks only."""
    (a, b), (old_a, old_b) = new, now
    if a.shape[1:] != old_a.shape[1:] or b.shape[:1] + b.shape[2:] != old_b.shape[:1] + old_b.shape[2:]:
        return False
    return a.shape[0] * old_b.shape[1] == b.shape[1] * old_a.shape[0]


def _resize(layer: LoraLayer, name: str, rank: int) -> None:
    """Pads the factors of an adapter with zeros, up to a rank."""
    tensors = store(layer, *load(layer, name), block_rank(layer, rank))
    for key, live in layer.key_map(name).items():
        path, _, attribute = live.rpartition(".")
        owner = layer.get_submodule(path)
        old = getattr(owner, attribute)
        # What is tied grows with the one that it is tied to.
        if key not in tensors or old.shape == tensors[key].shape or isinstance(owner, TiedFactor):
            continue
        new = nn.Parameter(tensors[key], requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)  # marks of other packages, such as Megatron
        setattr(owner, attribute, new)
        out, into = ("out_features", "out_channels", "output_size"), ("in_features", "in_channels", "input_size")
        for size in out if "lora_A" in key else into:
            if hasattr(owner, size):
                setattr(owner, size, len(tensors["lora_A.weight"]))


def _set_alpha(layer: LoraLayer, name: str, alpha: float, r: int) -> None:
    """Gives an adapter the scale that `alpha` and `r` mean, whatever rank its tensors are padded to."""
    layer.r[name] = rank = _rank(layer, name)
    layer.lora_alpha[name] = alpha * (rank / r) ** (0.5 if layer.use_rslora[name] else 1)
    layer.set_scale(name, 1.0)


def _record(config: Any, layers: Mapping[str, LoraLayer], name: str) -> None:
    """Lets an adapter's configuration say what its layers have, so that it can be saved."""
    targets = {target_name(path.removeprefix(ROOT), layer): layer for path, layer in layers.items()}
    config.r, config.rank_pattern = as_pattern({key: layer.r[name] for key, layer in targets.items()})
    alphas = {key: layer.lora_alpha[name] for key, layer in targets.items()}
    config.lora_alpha, config.alpha_pattern = as_pattern(alphas)
