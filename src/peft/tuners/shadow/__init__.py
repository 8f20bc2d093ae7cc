"""ShadowPEFT: a small network runs beside the model, and corrects what goes into its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.base_op import BaseOp, BlockOp
from peft.core.call import Call, begin, current, end, fact
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.model_config import CACHE_NAMES, cache_in, cache_name, is_checkpointed, take_cache
from peft.core.part import without
from peft.core.plan import Plan
from peft.core.slots import ModuleSlot, Setting
from peft.core.storage import place_of
from peft.core.tuner import BaseTuner
from peft.registry import PeftType, TaskType
from peft.tuners.shadow import detached, network
from peft.values import Fraction, NonNegativeFloat, PositiveInt

#: the fact of a call that holds the state beside it
_STATE = "shadow state"


@dataclass
class ShadowConfig(LayerConfig, peft_type=PeftType.SHADOW):
    """ShadowPEFT: a small trained network beside the frozen model makes a state s_0 of its own from the same input.

    Into each block goes h + shadow_alpha * U D dropout(h - s) instead of h, with D [r, width] and U [width, r]; after
    it, s becomes (1 - g) s + g t with g = sigmoid(G(h)) and t = T(h), for networks G and T of two layers. The loss gets
    `auxiliary_loss_weight` times that of the small network alone, which `unload_shadow` gives as a model.

    For causal language models and classifiers of texts. It cannot be merged, and one adapter is active at a time.

    Args:
        r: width of the bottleneck through which blocks are corrected.
        shadow_alpha: factor on the correction.
        shadow_dropout: probability of dropout before it.
        init_weights: start with U zero, without effect; False starts it at random.
        update_hidden_size: hidden width of G and T; r if None.
        auxiliary_loss_weight: factor on the small network's own loss.
        shadow_model: `"mirror"` makes a network of the kind of the base model; else the name of a pretrained one.
        shadow_num_hidden_layers: depth of the mirror; 1 if None.
        shadow_intermediate_size: width of its feed-forward layers; the base's if None, as for what follows.
        shadow_hidden_size: width of its states.
        shadow_num_attention_heads: heads of its attention.
        share_embeddings: let a mirror of the same width have the embeddings of the base, which stay frozen.
    """

    r: PositiveInt = 8
    shadow_alpha: float = 0.1
    shadow_dropout: Fraction = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: PositiveInt | None = None
    shadow_hidden_size: PositiveInt | None = None
    shadow_num_attention_heads: PositiveInt | None = None
    shadow_intermediate_size: PositiveInt | None = None
    share_embeddings: bool = True
    update_hidden_size: PositiveInt | None = None
    auxiliary_loss_weight: NonNegativeFloat = 0.05

    def check(self) -> None:
        sizes = [name for name in ("shadow_num_hidden_layers", *network.MIRRORED) if getattr(self, name) is not None]
        if self.shadow_model != "mirror" and sizes:
            raise ValueError(f"shadow_model={self.shadow_model!r} has its sizes: leave out {', '.join(sizes)}.")
        if self.target_parameters:
            raise ValueError("SHADOW goes around blocks of a model; target_parameters has no meaning for it.")


class ShadowLayer(AdapterLayer):
    """A decoder block whose input is corrected by the state that runs beside it."""

    kinds = frozenset(("Block",))
    cannot_merge = (
        "SHADOW cannot be merged: what it adds depends on the input. unload() gives the base model back,"
        " unload_shadow() the small network as a model of its own."
    )

    shadow_down = ModuleSlot[nn.Linear]()
    shadow_up = ModuleSlot[nn.Linear]()
    shadow_update_transform = ModuleSlot[nn.Sequential]()
    shadow_update_gate = ModuleSlot[nn.Sequential]()
    shadow_backbone = ModuleSlot[nn.Module](shared=True)
    shadow_projection = ModuleSlot[nn.Module](shared=True)
    shadow_head = ModuleSlot[nn.Module](shared=True)

    #: what the layers share
    beside: dict[str, nn.ModuleDict]
    shadow_alpha = Setting[float]()
    shadow_dropout = Setting[float]()

    @classmethod
    def op_of(cls, module: nn.Module, parameter_name: str | None) -> BaseOp | None:
        return BlockOp(module) if parameter_name is None and any(True for _ in module.children()) else None

    def create(self, name: str, config: ShadowConfig, width: int = 0) -> None:
        hidden = config.update_hidden_size or config.r
        self.shadow_down[name] = nn.Linear(width, config.r, bias=False)
        self.shadow_up[name] = up = nn.Linear(config.r, width, bias=False)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        for networks in (self.shadow_update_transform, self.shadow_update_gate):
            networks[name] = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def share(self, containers: Mapping[str, nn.Module]) -> None:
        # Not as modules of its own: the network would be in the model once for each block.
        self.__dict__["beside"] = dict(containers)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        containers: list[Any] = list(self.__dict__["beside"].values())
        shared = [parameter for held in containers if name in held for parameter in held[name].parameters()]
        return [*super().adapter_parameters(name), *shared]

    def trainable_parameters(self, name: str) -> list[nn.Parameter]:
        """All but the embeddings of a pretrained network."""
        parameters = self.adapter_parameters(name)
        if name not in self.configs or self.configs[name].shadow_model == "mirror":
            return parameters
        backbone: Any = self.beside["shadow_backbone"][name]
        return without(parameters, backbone.get_input_embeddings().parameters())

    def check_active(self, names: Any) -> None:
        if len(names) > 1:
            raise ValueError(f"One SHADOW adapter at a time can be active, not {len(names)} ({', '.join(names)}).")

    def key_map(self, name: str) -> dict[str, str]:
        return _in_files(super().key_map(name), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The block's forward; takes and returns what that takes and returns."""
        beside = fact(_STATE)
        if beside is None or self._disable_adapters or not self._live:
            return self.base_layer(hidden_states, *args, **kwargs)
        name, state = self._live[0], beside.now()
        if state.shape != hidden_states.shape:
            shapes = f"{tuple(state.shape)} of the shadow network, {tuple(hidden_states.shape)} of the block"
            raise ValueError(f"States have the shapes {shapes}: both have to see the same tokens.")
        output = self.base_layer(self.corrected(name, hidden_states, state), *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        beside.now = lambda: self.updated(name, hidden, state)  # made when the next block asks, so not after the last
        return output

    def corrected(self, name: str, hidden: Tensor, state: Tensor) -> Tensor:
        """h + alpha U D dropout(h - s)."""
        down = self.shadow_down[name]
        gap = F.dropout((hidden - state).to(down.weight.dtype), self.shadow_dropout[name], self.training)
        return hidden + (self.shadow_alpha[name] * self.shadow_up[name](down(gap))).to(hidden.dtype)

    def updated(self, name: str, hidden: Tensor, state: Tensor) -> Tensor:
        """(1 - g) s + g t."""
        transform: Any = self.shadow_update_transform[name]
        hidden = hidden.to(transform[0].weight.dtype)
        gate = self.shadow_update_gate[name](hidden).sigmoid()
        return torch.lerp(state.to(hidden.dtype), transform(hidden), gate).to(state.dtype)

    def of_module(self, name: str) -> Any:
        beside = self.__dict__.get("beside", {})
        return beside[name] if name in beside else super().of_module(name)


def _in_files(keys: dict[str, str], name: str) -> dict[str, str]:
    """In files, what is in these modules stands below "default", whatever the adapter's name."""
    return {live.replace(f".{name}.", ".default.", 1): live for live in keys.values()}


@dataclass
class _Beside:
    """The state that runs beside a call: `start` [batch, length, width], and `now`, what the blocks have made of it."""

    start: Tensor
    now: Callable[[], Tensor]


class ShadowMethod(Method):
    """The small network of each adapter, and when it runs: before each forward pass of the base model."""

    #: what the last block makes of the state, no block reads
    idle_slots = ("shadow_update_transform", "shadow_update_gate")

    #: the small network's own loss in the last forward pass with labels
    last_shadow_loss: Tensor | None = None

    # ---- adding an adapter

    def choose_targets(self, config: ShadowConfig, model_config: dict[str, Any]) -> None:
        blocks, _ = network.find_blocks(self.model)
        count = len(self.model.get_submodule(blocks))  # type: ignore[arg-type]
        targets: Any = {f"{blocks}.{index}" for index in range(count)}
        config.target_modules = targets

    def layer_settings(self, config: ShadowConfig, key: str) -> dict[str, Any]:
        return {"width": network.width_of(self.model)}

    def share(self, plan: Plan, config: ShadowConfig, adapter_name: str) -> dict[str, Any]:
        _, backbone = network.find_blocks(self.model)
        device, dtype = place_of(self.model)
        with torch.device("meta") if device is not None and device.type == "meta" else torch.device("cpu"):
            projection: Any = None
            if config.shadow_model == "mirror":
                small = network.mirror(backbone, config)
            else:
                small, projection = network.load_network(config.shadow_model)
            widths = network.width_of(small), network.width_of(self.model)
            if projection is None:
                projection = nn.Linear(*widths, bias=False) if widths[0] != widths[1] else nn.Identity()
            elif (projection.in_features, projection.out_features) != widths:
                raise ValueError(
                    f"The projection of {config.shadow_model!r} goes from {projection.in_features} to"
                    f" {projection.out_features}; it has to go from {widths[0]} to {widths[1]}, the width of the model."
                )
        if self._lends_embeddings(config, small) and "embed_tokens" in small._modules:
            small.embed_tokens = nn.Identity()
        made = {"shadow_backbone": small, "shadow_projection": projection, "shadow_head": self._own_head(config)}
        return {slot: module.to(dtype) for slot, module in made.items() if module is not None}

    def _lends_embeddings(self, config: ShadowConfig, small: nn.Module) -> bool:
        """Whether the small network gets the embeddings of the base model."""
        mirrored = config.share_embeddings and config.shadow_model == "mirror"
        return mirrored and network.takes_vectors(small) and network.width_of(small) == network.width_of(self.model)

    def _own_head(self, config: ShadowConfig) -> nn.Module | None:
        """A copy of the base model's classifier, which is trained for the small network."""
        if config.task_type != TaskType.SEQ_CLS:
            return None
        head = next((head for name in ("score", "classifier") if (head := getattr(self.model, name, None))), None)
        return deepcopy(head.original_module if isinstance(head, ModulesToSaveWrapper) else head)

    def added(self, adapter_name: str) -> None:
        self.watch_calls(bool(self.configs), self._before, self._after)

    removed = added

    def key_map(self, adapter_name: str, config: ShadowConfig) -> dict[str, str]:
        return _in_files(super().key_map(adapter_name, config), adapter_name)

    # ---- while the model runs

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the small network, with keys and values of its own in the cache of the base model."""
        outer = current() or Call()
        if outer.route is not None:
            raise ValueError("SHADOW adapters cannot differ from sample to sample (adapter_names); use set_adapter().")
        active, networks = self.tuner.active_adapters, self.network("backbone")
        if self.tuner.disabled or not active or active[0] not in networks:
            return None
        self.last_shadow_loss, kwargs = None, dict(kwargs)
        given = {name: kwargs.get(name) for name in ("input_ids", "inputs_embeds")}
        given["input_ids"] = args[0] if args else given["input_ids"]
        cache = self._cache(kwargs)
        take_cache(kwargs)
        kwargs[cache_name(self.model) or CACHE_NAMES[-1]] = cache
        state = self.start(active[0], given, kwargs, cache)
        begin(Call(None, {**outer.facts, _STATE: _Beside(state, lambda: state)}))
        return args, kwargs

    def network(self, part: str) -> Any:
        """A part of the small networks (backbone, projection, head), by adapter."""
        return self.shared[f"shadow_{part}"]

    def _cache(self, kwargs: dict[str, Any]) -> Any:
        """The cache of the base model's forward pass, None if it has none."""
        model: Any = self.model
        given, wanted = cache_in(kwargs), kwargs.get("use_cache")
        wanted = getattr(model.config, "use_cache", False) if wanted is None else wanted
        if given is not None or not wanted or (model.training and is_checkpointed(model)):
            return given
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def start(self, name: str, given: dict[str, Any], kwargs: dict[str, Any], cache: Any = None) -> Tensor:
        """s_0 [batch, length, width], what the small network makes of an input.

        Args:
            name: the adapter.
            given: `input_ids` or `inputs_embeds`.
            kwargs: the base model's further arguments.
            cache: that of the base model, in which the small network's layers come after its own.
        """
        small: Any = self.network("backbone")[name]
        inputs = {key: value for key, value in given.items() if value is not None}
        if "inputs_embeds" in inputs:
            inputs.pop("input_ids", None)
        elif self._lends_embeddings(self.configs[name], small):
            inputs = {"inputs_embeds": self.model.get_input_embeddings()(inputs["input_ids"])}  # type: ignore[operator]
        if "inputs_embeds" in inputs:  # the model may be in halves
            inputs["inputs_embeds"] = inputs["inputs_embeds"].to(place_of(small)[1])
        inputs |= {key: kwargs[key] for key in ("attention_mask", "position_ids") if kwargs.get(key) is not None}
        own, depth = None, int(network.read_model_config(self.model, "num_layers"))
        if cache is not None:
            from transformers import DynamicCache

            own = DynamicCache(config=small.config)
            if len(cache.layers) > depth:
                own.layers = cache.layers[depth:]
        inputs[cache_name(small) or CACHE_NAMES[-1]] = own
        output = small(**inputs, use_cache=cache is not None, return_dict=True)
        if own is not None:
            while len(cache.layers) < depth:
                cache.layers.append(cache.layer_class_to_replicate())
            cache.layers[depth:] = own.layers
        return self.network("projection")[name](output.last_hidden_state)

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Adds the small network's own loss."""
        beside = fact(_STATE)
        if beside is None:
            return output
        end()
        labels, loss, name = kwargs.get("labels"), getattr(output, "loss", None), self.tuner.active_adapters[0]
        config, head = self.configs[name], self.head(name)
        if labels is None or loss is None or head is None:
            return output
        if config.task_type == TaskType.CAUSAL_LM:
            own = network.language_loss(network.logits(head, beside.start), labels)
        else:
            states = network.pooled(beside.start, kwargs.get("attention_mask"))
            own = network.classes_loss(network.logits(head, states), labels)
        self.last_shadow_loss = output.shadow_loss = own.detach()
        if config.auxiliary_loss_weight:
            output.loss = loss + config.auxiliary_loss_weight * own.to(loss.device)
        return output

    def head(self, name: str) -> Any:
        """What makes logits of the small network's states: its own classifier, or the output layer of the model."""
        own = self.network("head")
        if name in own:
            return own[name]
        model: Any = self.model
        return model.get_output_embeddings() if self.configs[name].task_type == TaskType.CAUSAL_LM else None

    # ---- the network alone

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> Any:
        """The small network of an adapter as a model of its own: one of transformers, which can generate and be saved.

        Args:
            adapter_name: the adapter; the active one if None.
            copy: give it tensors of its own, embeddings included; else it shares them with this model.

        Raises:
            ValueError: there is no such adapter.
        """
        name = self.tuner.active_adapters[0] if adapter_name is None else self.tuner.check_names(adapter_name)[0]
        take: Any = deepcopy if copy else lambda module: module
        small = take(self.network("backbone")[name])
        projection, head = take(self.network("projection")[name]), take(self.head(name))
        model: Any = self.model
        lent = take(model.get_input_embeddings()) if self._lends_embeddings(self.configs[name], small) else None
        is_classification = self.configs[name].task_type == TaskType.SEQ_CLS
        return detached.DetachedShadowModel(small, projection, head, is_classification, lent)


class ShadowModel(BaseTuner, layer=ShadowLayer, method=ShadowMethod, prefix="shadow_"):
    """A model with small networks beside it."""
