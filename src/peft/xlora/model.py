"""X-LoRA on a model: the first pass, what it makes of the second, and the life of the mixture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.call import calling, current, fact
from peft.core.layer import AdapterLayer
from peft.core.model_config import cache_in, read_model_config
from peft.core.part import check_adapter_name, trained_in
from peft.core.storage.sharded import agree, average_gradients
from peft.core.wrappers import state_names
from peft.registry import PeftType
from peft.tuners.lora.model import LoraMethod, LoraModel
from peft.tuners.lora.variants import VARIANTS
from peft.untrusted import is_said_by_file
from peft.xlora.config import XLoraConfig
from peft.xlora.gate import WEIGHTS, XLoraClassifier, choose
from peft.xlora.layer import NO_ROUTES, XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer


class _Holder(nn.Module):
    """Holds the model under the name that checkpoints of X-LoRA models give it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class XLoraMethod(LoraMethod):
    """What X-LoRA says about a whole model: what its experts are, and that each pass is weighed by one before it."""

    tuner: XLoraModel

    @classmethod
    def start_is_replaceable(cls, config: Any) -> bool:
        return isinstance(config, XLoraConfig) or super().start_is_replaceable(config)

    def members(self, adapter_name: str, config: XLoraConfig) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        if self.tuner.xlora_name is not None:
            raise ValueError(f"The model has an X-LoRA adapter, {self.tuner.xlora_name!r}; there cannot be a second.")
        model_config: Any = getattr(self.model, "config", None)
        if getattr(model_config, "use_cache", False):
            raise ValueError(
                "X-LoRA needs model.config.use_cache = False: it runs every token through the model twice, with other"
                " keys and values each time."
            )
        if model_config is None or getattr(model_config, "is_encoder_decoder", False):
            raise ValueError(f"X-LoRA needs a decoder of transformers; got a {type(self.model).__name__}.")
        found = read_model_config(self.model, "token_dim")
        config.hidden_size = config.hidden_size or found
        if config.hidden_size is None or found not in (None, config.hidden_size):
            raise ValueError(f"hidden_size={config.hidden_size}, but that of the model is {found or 'not known'}.")
        if not config.adapters:
            raise ValueError("XLoraConfig.adapters is empty: give a name and a saved LoRA for each expert.")
        config.check_top_k()
        for name in config.adapters:
            check_adapter_name(name)
            if "/" in name or "\\" in name:
                raise ValueError(f"{name!r} cannot name an expert: it is saved in a folder of that name.")
            if name == adapter_name:
                raise ValueError(f"Adapter name {name!r} is that of the mixture; call the expert otherwise.")
        places: dict[str, list[tuple[str, dict[str, Any]]]] = {
            name: [(os.fspath(path), {})] for name, path in config.adapters.items()
        }
        if config._saved_in is not None:
            source, options = config._saved_in
            for name, named in places.items():
                subfolder = "/".join(part for part in (options.get("subfolder"), name) if part)
                saved = source, {**options, "subfolder": subfolder}
                places[name] = [saved] if is_said_by_file(config, "adapters") else [saved, *named]
        return places

    def owner(self, adapter_name: str) -> str | None:
        return None if adapter_name == self.tuner.xlora_name else self.tuner.xlora_name

    def make_layer(self, config: Any, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        kind = XLoraEmbeddingLayer if isinstance(target, nn.Embedding) else XLoraLinearLayer
        return kind(target, parameter_name=parameter_name)

    def check_config(self, adapter_name: str, config: Any) -> None:
        if config.peft_type != PeftType.LORA:
            raise ValueError(f"Expert {adapter_name!r} is a {config.peft_type} adapter; X-LoRA mixes LoRA adapters.")
        super().check_config(adapter_name, config)
        for setting in (*VARIANTS, "lora_bias"):
            if getattr(config, setting):
                raise ValueError(f"X-LoRA mixes plain LoRA; expert {adapter_name!r} has {setting}.")

    def key_map(self, adapter_name: str, config: Any) -> dict[str, str]:
        if adapter_name != self.tuner.xlora_name:
            return {}
        name = "internal_xlora_classifier"
        return {f"{name}.{key}": f"{name}.{key}" for key in state_names(self.tuner.internal_xlora_classifier)}

    # ---- forward

    @contextmanager
    def around_forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        if self.tuner.disabled or self.tuner.xlora_name is None:
            yield
            return
        # `generate` calls the model many times, so what comes before a pass is a hook.
        with self.model.register_forward_pre_hook(self._weigh, with_kwargs=True), calling():
            yield

    @contextmanager
    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        if kwargs.setdefault("use_cache", False) and not self.tuner.disabled:
            raise ValueError("X-LoRA generates with use_cache=False only: weights change a token's keys and values.")
        with self.around_forward(args, kwargs):
            yield

    def _weigh(self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the first pass and sets the weights for the second."""
        if isinstance(fact(WEIGHTS), float):
            return  # this is the first pass
        if cache_in(kwargs) is not None:
            raise ValueError("X-LoRA cannot go on from a cache (past_key_values): it runs all tokens twice.")
        config, classifier = self.tuner.xlora_config, self.tuner.internal_xlora_classifier
        first = {key: value for key, value in kwargs.items() if key != "labels"}
        first.update(output_hidden_states=True, return_dict=True)
        share = float(config.scaling_pass_value * config.global_scaling_weight)
        with torch.no_grad(), calling(**{WEIGHTS: share}):
            hidden = module(*args, **first).hidden_states[-1]
        self.tuner._scalings = scalings = classifier(hidden)
        if self.tuner._is_logging:
            self.tuner._log.append(scalings.detach())
        if config.top_k_lora is not None or config.enable_softmax_topk:
            scalings = choose(scalings, config.top_k_lora, config.enable_softmax_topk)
        call = current()
        assert call is not None  # `around_forward` has begun one
        weights = (scalings * config.global_scaling_weight).unbind(-1)
        call.facts[WEIGHTS] = dict(zip(config.adapters, weights, strict=True))


class XLoraModel(LoraModel, layer=XLoraLayer, method=XLoraMethod, prefix="xlora_"):
    """A model with a mixture of LoRA adapters (arXiv:2402.07148).

    `internal_xlora_classifier` weighs the experts, which are LoRA adapters with configurations in `peft_config` under
    their own names.
    """

    holder = "lora_model.model"

    internal_xlora_classifier: XLoraClassifier

    def hold(self, model: nn.Module) -> None:
        self.lora_model = _Holder(model)
        #: name of the mixture; None while only experts are there
        self.xlora_name: str | None = None
        #: what the classifier gave last
        self._scalings: Tensor | None = None
        self._is_logging = False
        self._log: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scalings": None}  # what belongs to one batch is not copied

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The base model."""
        return self.lora_model.model

    @property
    def xlora_config(self) -> XLoraConfig:
        """The configuration of the mixture."""
        return self.peft_config[self.xlora_name or ""]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Adds an expert, or the mixture when all experts are there."""
        config = kwargs.get("config")
        if not isinstance(config, XLoraConfig):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, *args, **kwargs)
            return
        layers = list(self.adapter_layers())
        device, dtype = layers[0].place()
        dtype = trained_in(dtype, autocast_adapter_dtype)
        classifier = XLoraClassifier(config, len(config.adapters), len(layers)).to(device, dtype)
        for number, layer in enumerate(layers):
            layer.__dict__["layer_number"] = number
        self.internal_xlora_classifier = classifier
        agree(classifier.parameters(), self.model)
        average_gradients(self)
        self.xlora_name = adapter_name
        experts = {name: self.peft_config.pop(name) for name in config.adapters}
        self.peft_config.update({adapter_name: config, **experts})
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    # ---- the life of the adapter

    @property
    def active_adapters(self) -> list[str]:
        return super().active_adapters if self.xlora_name is None else [self.xlora_name]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        names = self.check_names(adapter_name)
        if self.xlora_name is None:  # while the experts are loaded
            super().set_adapter(names, inference_mode)
            return
        if names != [self.xlora_name]:
            raise ValueError(f"Only the mixture {self.xlora_name!r} can be active, with all its experts; got {names}.")
        trains_experts = self.xlora_config.use_trainable_adapters and not inference_mode
        super().set_adapter(list(self.xlora_config.adapters), inference_mode=not trains_experts)
        self.internal_xlora_classifier.requires_grad_(not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = self.check_names(adapter_names)
        super().set_requires_grad([name for name in names if name != self.xlora_name], requires_grad)
        if self.xlora_name in names:
            self.internal_xlora_classifier.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.xlora_name is None or adapter_name not in self.peft_config:
            super().delete_adapter(adapter_name)
            return
        if adapter_name != self.xlora_name:
            raise ValueError(f"Adapter {adapter_name!r} is an expert of {self.xlora_name!r}, which needs it.")
        experts = self.peft_config.pop(adapter_name).adapters
        del self.internal_xlora_classifier
        self.xlora_name = None
        for name in experts:
            super().delete_adapter(name)

    def routed(self, adapter_names: Sequence[str]) -> AbstractContextManager[Any]:
        raise ValueError(NO_ROUTES)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("An X-LoRA model mixes its adapters itself; combine them before.")

    # ---- settings that may change, and what the classifier has said

    def set_topk_lora(self, value: int | None) -> None:
        """Sets how many experts a token gets; all if None.

        Raises:
            ValueError: not from 1 to the number of experts.
        """
        experts = len(self.xlora_config.adapters)
        if value is not None and not 1 <= value <= experts:
            raise ValueError(f"top_k_lora must be from 1 to {experts}, or None; got {value}.")
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Sets the factor on all weights."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """The factor on all weights."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Sets the weight of every expert in the first pass; one over the number of experts if None."""
        self.xlora_config.scaling_pass_value = 1 / len(self.xlora_config.adapters) if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """What the classifier gave last, before `top_k_lora`: [batch, tokens, layers, experts]; None if nothing yet."""
        return self._scalings

    internal_xlora_scalings = property(get_latest_scalings)

    def enable_scalings_logging(self) -> None:
        """From now on, what the classifier gives is kept."""
        self._is_logging = True

    def disable_scalings_logging(self) -> None:
        """Ends that; what has been kept stays."""
        self._is_logging = False

    def clear_scalings_log(self) -> None:
        """Forgets what has been kept."""
        self._log.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """What has been kept, one [batch, tokens, layers, experts] for each forward pass, without gradients."""
        return list(self._log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """The log by number of tokens: tokens -> (places in the log, what is there)."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for place, scalings in enumerate(self._log):
            places, entries = buckets.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            entries.append(scalings)
        return buckets
