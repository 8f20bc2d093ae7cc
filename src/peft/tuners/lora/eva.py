"""EVA: A starts with the directions that explain most of a layer's inputs, and layers share out the ranks by that."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map

from peft.core.places import take_away_everywhere
from peft.core.storage.shared import is_one_of_many
from peft.core.targets import ROOT, base_of, target_name
from peft.core.walk import layers_of, put_back
from peft.errors import warn
from peft.ops.pca import IncrementalPca
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.kinds import Linear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.preprocess import targeted
from peft.tuners.lora.settings import EvaConfig

#: passes over the data after which the components are taken as they are
_MOST_PASSES = 100

PrepareLayer = Callable[[Any, Any, str], Tensor]
PrepareLayers = PrepareLayer | Mapping[str, PrepareLayer] | None


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model called with a batch that is a mapping of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Which positions of a batch count: those that neither attention mask nor labels mask, as indices [positions, 2].

    Raises:
        TypeError: the batch is no mapping.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(f"A batch for language models is a mapping with input_ids, got {type(model_input).__name__}.")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    setting: EvaConfig = peft_config.eva_config or EvaConfig()  # type: ignore[assignment]
    if setting.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != setting.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The inputs of a layer at the positions that count: [positions, features]."""
    return _first_tensor(layer_input, layer_name)[model_input.T.unbind()]


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    return _first_tensor(layer_input, layer_name).flatten(0, -2)


def _first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(found, Tensor):
        raise TypeError(f"The input of {layer_name!r} is a {type(found).__name__}: give it a prepare_layer_inputs_fn.")
    return found


class _Inputs:
    """The inputs of one layer, taken in while it is watched.

    Args:
        name: the layer's name.
        prepare: makes rows of what the layer is called with.
        gather: join the rows of all processes.
        count: how many components are looked for.
    """

    def __init__(self, name: str, prepare: PrepareLayer | None, gather: bool, count: int):
        self.name, self.prepare, self.gather = name, prepare or _all_rows, gather
        #: that of the first layer, where several have the same inputs
        self.pca = IncrementalPca(count)
        self.batch: Any = None
        #: of the first batch: tells inputs of different layers apart that are one and the same tensor
        self.stamp: Any = None
        #: whether it is that first layer, whose inputs are looked at for all; None until that is known
        self.leads: bool | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.leads is None:
            tensor = _first_tensor(inputs, self.name)
            self.stamp = tensor.data_ptr(), tensor.shape, tensor.double().square().sum().item()
        elif self.leads:
            rows = self.prepare(inputs, self.batch, self.name).detach()
            rows = _gathered(rows) if self.gather else rows
            if len(rows) >= self.pca.count:
                self.pca.update(rows)


def _gathered(rows: Tensor) -> Tensor:
    if not is_one_of_many():
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayers = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Directions that explain most of the inputs of each layer (arXiv:2410.07170), for `initialize_lora_eva_weights`.

    The data is gone through, again and again if need be, until the directions stay as they are.

    Args:
        model: a base model, or one with an adapter.
        dataloader: batches; can be gone through more than once.
        peft_config: the configuration, where the model has no adapter.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: makes of a batch and the configuration what `prepare_layer_inputs_fn` needs of it; None
            leaves it as it is.
        prepare_layer_inputs_fn: makes rows [rows, features] of a layer's inputs, what is known of the batch, and the
            layer's name; a mapping has one for each layer; None takes all positions.
        adapter_name: the adapter, where the model has one.
        gather_distributed_inputs: join what several processes see.
        show_progress_bar: show one.

    Returns:
        For each layer by name, A [rank, in], where the ranks of all layers together are what the configuration has.

    Raises:
        ValueError: there is no data, no configuration, or no batch has as many rows as components are wanted.
    """
    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise ValueError("The dataloader is empty.")
    config, layers = _layers(model, peft_config, adapter_name)
    setting: EvaConfig = config.eva_config or EvaConfig()  # type: ignore[assignment]
    watched = _watched(layers, config, prepare_layer_inputs_fn, gather_distributed_inputs, setting.rho)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def run(batch: Any) -> None:
        batch = tree_map(lambda value: value.to(device) if hasattr(value, "to") else value, batch)
        known = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        for inputs in watched.values():
            inputs.batch = known
        forward_fn(model, batch)

    budget = sum(config.at(name).r for name in layers)
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext())
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(watched[name]))
        ranks = _ranks_found(watched, dataloader, run, budget, setting.tau, show_progress_bar)
    return {name: inputs.pca.directions(ranks[name], setting.whiten) for name, inputs in watched.items()}


def _watched(
    layers: Mapping[str, nn.Module], config: LoraConfig, prepare: PrepareLayers, gather: bool, rho: float
) -> dict[str, _Inputs]:
    """What sees the inputs of each layer."""
    by_layer = prepare if isinstance(prepare, Mapping) else dict.fromkeys(layers, prepare)
    unknown = sorted(set(by_layer) - set(layers))
    if unknown:
        raise ValueError(f"prepare_layer_inputs_fn names {', '.join(unknown)}, which are no layers of the adapter.")
    watched = {}
    for name, layer in layers.items():
        width = getattr(base_of(layer), "in_features", 2**31)
        watched[name] = _Inputs(name, by_layer.get(name), gather, min(round(config.at(name).r * rho), width))
    return watched


def _ranks_found(
    watched: Mapping[str, _Inputs],
    batches: Iterable[Any],
    run: Callable[[Any], None],
    budget: int,
    tau: float,
    show: bool,
) -> dict[str, int]:
    """Goes through the data until the components that count stay as they are; returns the ranks of the layers."""
    from tqdm.auto import tqdm

    for batch in islice(batches, 1):
        run(batch)
    first: dict[Any, _Inputs] = {}
    for inputs in watched.values():
        lead = first.setdefault(inputs.stamp, inputs)
        lead.pca.count = max(lead.pca.count, inputs.pca.count)
        inputs.leads, inputs.pca = inputs is lead, lead.pca
    ranks: dict[str, int] = {}
    hidden = not show or (is_one_of_many() and dist.get_rank() > 0)
    with tqdm(total=len(watched), desc="EVA: layers whose directions are found", disable=hidden, leave=False) as bar:
        for _ in range(_MOST_PASSES):
            for batch in batches:
                run(batch)
                if any(one.pca.components is None for one in first.values()):
                    continue
                ranks = _shared_out({name: inputs.pca.shares for name, inputs in watched.items()}, budget)
                needed = Counter[IncrementalPca]()
                for name, inputs in watched.items():
                    needed[inputs.pca] = max(needed[inputs.pca], ranks[name])
                bar.n = sum(inputs.pca.is_stable(needed[inputs.pca], tau) for inputs in watched.values())
                bar.refresh()
                if bar.n == len(watched):
                    return ranks
            short = [one for one in first.values() if one.pca.components is None]
            if short:
                raise ValueError(
                    f"No batch has {short[0].pca.count} positions for {short[0].name!r}, as many as components are"
                    " looked for: use larger batches, a smaller rho or a smaller rank."
                )
    warn(f"EVA's directions still changed after {_MOST_PASSES} passes over the data.")
    return ranks


def _shared_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """A budget of ranks, given to the components that explain the largest shares of their layer's variance."""
    owners = [name for name, some in shares.items() for _ in some]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)[:budget]
    counts = Counter(owners[index] for index in order.tolist())
    return {name: counts[name] for name in shares}


def _layers(model: Any, config: Any, adapter_name: str) -> tuple[LoraConfig, Mapping[str, nn.Module]]:
    """The configuration, and the layers by name: those that have the adapter, or would get it."""
    if hasattr(model, "peft_config"):
        linear = layers_of(model, Linear, adapter_name)
        here = {name: layer for name, layer in linear.items() if not layer.with_attention}
        return config or model.peft_config[adapter_name], here
    if config is None:
        raise ValueError("peft_config is needed for a model without an adapter.")
    return config, targeted(model, config)


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayers = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Starts an adapter made with `init_lora_weights="eva"` (arXiv:2410.07170): A, and how the layers share the ranks.

    Layers that get no rank are left without the adapter. The configuration says afterwards which layers have which
    ranks, so that the adapter can be saved and loaded.

    Args:
        model: a model with such an adapter.
        dataloader: batches to find the directions in.
        eva_state_dict: what `get_eva_state_dict` has found, in place of `dataloader`.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name, gather_distributed_inputs,
            show_progress_bar: as for `get_eva_state_dict`.

    Raises:
        ValueError: the model has no such adapter, several are active, or there is neither data nor an outcome.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError(
            f"initialize_lora_eva_weights needs an adapter made with init_lora_weights='eva'; {adapter_name!r} is"
            f" {'not there' if config is None else f'made with {config.init_lora_weights!r}'}."
        )
    if len(model.active_adapters) > 1:
        raise ValueError(f"One adapter may be active for EVA; {', '.join(model.active_adapters)} are.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("Either dataloader or eva_state_dict is needed.")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    _start(model, config, adapter_name, eva_state_dict)


def _start(model: Any, config: LoraConfig, adapter_name: str, found: dict[str, Tensor]) -> None:
    tuner: Any = model.base_model
    config.__dict__["_eva_has_run"] = True
    plain = copy.copy(config)
    plain.init_lora_weights = True
    setting = config.eva_config or EvaConfig()
    ranks, alphas = {}, {}
    for path, layer in layers_of(tuner.model, LoraLayer, adapter_name).items():
        key = target_name(path, layer)
        directions = next((found[name] for name in (ROOT + path, path, key) if name in found), None)
        if directions is not None and len(directions) == 0:
            _leave_out(tuner, layer, path, adapter_name)
            continue
        if directions is None:
            warn(f"EVA has found nothing for {key!r}, which starts as usual.")
        own = config.at(key)
        ranks[key] = new = own.r if directions is None else len(directions)
        alphas[key] = own.lora_alpha * new / own.r if setting.adjust_scaling_factors else own.lora_alpha  # type: ignore[union-attr]
        if new != own.r or layer.factors(adapter_name)[0].is_meta:
            trained = any(parameter.requires_grad for parameter in layer.adapter_parameters(adapter_name))
            dtype = layer.dtype_of(adapter_name)
            layer.update_layer(adapter_name, new, alphas[key], plain, target_name=key)
            layer.move(adapter_name, dtype=dtype)
            layer.set_requires_grad(adapter_name, trained)
        if directions is not None:
            layer.factors(adapter_name)[0].copy_(directions)
    config.target_modules = set(ranks)  # type: ignore[assignment]
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {key: alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}


def _leave_out(tuner: Any, layer: LoraLayer, path: str, adapter_name: str) -> None:
    """Takes the adapter off one layer, and the layer off its module if that was all it was for."""
    active = layer.active_adapters
    layer.delete_adapter(adapter_name)
    if layer.adapter_names() and layer.active_adapters != active:
        layer.set_adapter(active)  # none of the others comes in its place
    elif not layer.adapter_names():
        put_back(tuner.model, path, layer.base_layer)
        take_away_everywhere(tuner.model, {layer: layer.base_layer})
        tuner._parts = None
        tuner.targeted_module_names.remove(target_name(path, layer))
