"""EVA: A starts with the directions that explain most of a layer's inputs, and layers share out the ranks by that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cosine_similarity

from peft.core.targets import base_of
from peft.core.walk import live_key, put_back
from peft.errors import warn
from peft.ops.pca import IncrementalPca
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.kinds import Linear
from peft.tuners.lora.layer import LoraLayer, alpha_of, rank_of
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
        self.pca = IncrementalPca(count)
        #: cosine of each component with what it was a batch before; empty as long as there is no such
        self.similarity = torch.empty(0)
        self.batch: Any = None
        #: of the first batch: tells inputs of different layers apart that are one and the same tensor
        self.stamp: Any = None
        self.is_first = True

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = self.prepare(inputs, self.batch, self.name).detach()
        if self.is_first:
            tensor = _first_tensor(inputs, self.name)
            self.stamp = tensor.data_ptr(), tensor.shape, tensor.double().square().sum().item()
            return
        rows = _gathered(rows) if self.gather else rows
        if len(rows) < self.pca.count:
            return
        before = self.pca.components
        self.pca.update(rows)
        if before is not None and self.pca.components is not None:
            self.similarity = cosine_similarity(self.pca.components, before).abs()  # a direction has no sign

    def is_stable(self, count: int, tau: float) -> bool:
        """Whether the first components stay as they are from batch to batch."""
        return len(self.similarity) > 0 and bool((self.similarity[:count] >= tau).all())

    def directions(self, count: int, whiten: bool) -> Tensor:
        """The first components that were found [count, features]."""
        assert self.pca.components is not None
        directions = self.pca.components[:count]
        return directions / self.pca.singular_values[:count, None].sqrt() if whiten else directions


def _gathered(rows: Tensor) -> Tensor:
    if not dist.is_initialized():
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
    search = _Search(layers, config, prepare_layer_inputs_fn, gather_distributed_inputs)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def run(batch: Any) -> None:
        batch = _moved(batch, device)
        known = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        for inputs in search.watched.values():
            inputs.batch = known
        forward_fn(model, batch)

    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            ranks = search.until_found(dataloader, run, show_progress_bar)
    finally:
        search.let_go()
        model.train(training)
    return search.directions(ranks)


class _Search:
    """The search for the directions of all layers.

    Attributes:
        watched: layer -> what is seen of its inputs.
        same: layer -> the first one that has the same inputs, of which alone more is seen.
    """

    def __init__(self, layers: Mapping[str, nn.Module], config: LoraConfig, prepare: PrepareLayers, gather: bool):
        by_layer = prepare if isinstance(prepare, Mapping) else dict.fromkeys(layers, prepare)
        unknown = sorted(set(by_layer) - set(layers))
        if unknown:
            raise ValueError(f"prepare_layer_inputs_fn names {', '.join(unknown)}, which are no layers of the adapter.")
        setting: EvaConfig = config.eva_config or EvaConfig()  # type: ignore[assignment]
        self._setting, self.same = setting, {name: name for name in layers}
        self._budget = sum(rank_of(config, name) for name in layers)
        self.watched, self._handles = {}, {}
        for name, layer in layers.items():
            width = getattr(base_of(layer), "in_features", 2**31)
            count = min(round(rank_of(config, name) * setting.rho), width)
            self.watched[name] = _Inputs(name, by_layer.get(name), gather, count)
            self._handles[name] = layer.register_forward_pre_hook(self.watched[name])

    def let_go(self) -> None:
        """Watches no longer."""
        for handle in self._handles.values():
            handle.remove()

    def _tell_apart(self) -> None:
        """Finds out which layers have the same inputs; the first of them looks for as many components as all need."""
        first: dict[Any, str] = {}
        self.same = {name: first.setdefault(inputs.stamp, name) for name, inputs in self.watched.items()}
        for name, one in self.same.items():
            pca = self.watched[one].pca
            pca.count = max(pca.count, self.watched[name].pca.count)
            self.watched[name].is_first = False
            if name != one:
                self._handles[name].remove()

    def _share_out(self) -> dict[str, int]:
        """The budget of ranks, given to the components that explain the largest shares of their layer's variance."""
        owners, shares = [], []
        for name, one in self.same.items():
            shares.append(self.watched[one].pca.shares)
            owners += [name] * len(shares[-1])
        order = torch.cat(shares).argsort(descending=True, stable=True)[: self._budget]
        counts = dict.fromkeys(self.same, 0)
        for index in order.tolist():
            counts[owners[index]] += 1
        return counts

    def until_found(self, dataloader: Iterable[Any], run: Callable[[Any], None], show: bool) -> dict[str, int]:
        """Goes through the data until the components that count stay as they are; returns the ranks of the layers."""
        for batch in islice(dataloader, 1):
            run(batch)
        self._tell_apart()
        sources = dict.fromkeys(self.same.values())
        ranks = {name: self.watched[one].pca.count for name, one in self.same.items()}
        bar = _progress_bar(len(self.watched), show)
        for _ in range(_MOST_PASSES):
            for batch in dataloader:
                run(batch)
                if any(self.watched[name].pca.components is None for name in sources):
                    continue
                ranks = self._share_out()
                needed = {one: max(ranks[name] for name in self.same if self.same[name] == one) for one in sources}
                stable = {one: self.watched[one].is_stable(needed[one], self._setting.tau) for one in sources}
                bar.n = sum(stable[one] for one in self.same.values())
                bar.refresh()
                if bar.n == len(self.same):
                    bar.close()
                    return ranks
            short = [name for name in sources if self.watched[name].pca.components is None]
            if short:
                raise ValueError(
                    f"No batch has {self.watched[short[0]].pca.count} positions for {short[0]!r}, as many as components"
                    " are looked for: use larger batches, a smaller rho or a smaller rank."
                )
        bar.close()
        warn(f"EVA's directions still changed after {_MOST_PASSES} passes over the data.")
        return ranks

    def directions(self, ranks: dict[str, int]) -> dict[str, Tensor]:
        """What was found for each layer: A [rank, in]."""
        whiten = self._setting.whiten
        return {name: self.watched[one].directions(ranks[name], whiten) for name, one in self.same.items()}


def _progress_bar(total: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    first = not dist.is_initialized() or dist.get_rank() == 0
    return tqdm(total=total, desc="EVA: layers whose directions are found", disable=not (show and first), leave=False)


def _layers(model: Any, config: Any, adapter_name: str) -> tuple[LoraConfig, Mapping[str, nn.Module]]:
    """The configuration, and the layers by name: those that have the adapter, or would get it."""
    if hasattr(model, "peft_config"):
        linear = ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))
        here = {name: module for name, module in linear if module.has(adapter_name) and not module.with_attention}
        return config or model.peft_config[adapter_name], here
    if config is None:
        raise ValueError("peft_config is needed for a model without an adapter.")
    return config, targeted(model, config)


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(value, device) for value in batch) if isinstance(batch, (tuple, list)) else batch


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
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and m.has(adapter_name)}
    prefix = next((name for name, module in model.named_modules() if module is tuner.model), "")
    targets, ranks, alphas = [], {}, {}
    for name, layer in layers.items():
        key = name[len(prefix) + 1 :] if prefix else name
        rank, alpha = rank_of(config, key), alpha_of(config, key)
        directions = found.get(name, found.get(key))
        if directions is not None and len(directions) == 0:
            _leave_out(tuner, layer, key, adapter_name)
            continue
        new = rank if directions is None else len(directions)
        if new != rank and setting.adjust_scaling_factors:  # type: ignore[union-attr]
            alpha = alpha * new / rank
        if directions is None:
            warn(f"EVA has found nothing for {key!r}, which starts as usual.")
        trained = any(parameter.requires_grad for parameter in layer.adapter_parameters(adapter_name))
        dtype = layer.dtype_of(adapter_name)
        if new != rank or layer.factors(adapter_name)[0].is_meta:
            layer.update_layer(adapter_name, new, alpha, plain, target_name=key)
            layer.move(adapter_name, dtype=dtype)
            layer.set_requires_grad(adapter_name, trained)
        if directions is not None:
            layer.factors(adapter_name)[0].copy_(directions)
        targets.append(key)
        if new != config.r:
            ranks[key] = new
        if alpha != config.lora_alpha:
            alphas[key] = alpha
    config.target_modules, config.rank_pattern, config.alpha_pattern = set(targets), ranks, alphas  # type: ignore[assignment]


def _leave_out(tuner: Any, layer: LoraLayer, key: str, adapter_name: str) -> None:
    """Takes the adapter off one layer, and the layer off its module if that was all it was for."""
    layer.delete_adapter(adapter_name)
    if not layer.adapter_names():
        put_back(tuner.model, live_key(tuner.model, key), layer.base_layer)
        tuner._parts = None
        tuner.targeted_module_names.remove(key)
