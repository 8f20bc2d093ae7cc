"""A model with LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import base_op
from peft.core.call import calling
from peft.core.layer import AdapterLayer
from peft.core.plan import Plan
from peft.core.targets import base_of
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.tuners.lora.base import TiedFactor
from peft.tuners.lora.combine import Combining
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.factors import FACTOR_KEYS
from peft.tuners.lora.kinds import LAYERS, Embedding, Linear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.megatron import check_megatron
from peft.tuners.lora.quantised import linear_class
from peft.tuners.lora.replication import replicate_layers, same_stack
from peft.tuners.lora.starts import drawn_from, settle_seed, start_of
from peft.tuners.lora.variants import variant_of
from peft.tuners.lora.variants.alora import Invocations
from peft.tuners.lora.variants.base import Variant
from peft.tuners.lora.variants.dora import Dora
from peft.tuners.lora.variants.kasa import Kasa
from peft.tuners.lora.variants.monteclora import Monteclora


class LoraMethod(Combining):
    """What LoRA says about a whole model: ranks by module, calls that are watched, losses, sums of adapters."""

    @classmethod
    def start_is_replaceable(cls, config: LoraConfig) -> bool:
        start, variant = start_of(config.init_lora_weights), variant_of(config)
        return not (start is not None and start.changes_base) and not (variant is not None and variant.changes_base)

    def complete_config(self, config: LoraConfig, model_config: dict[str, Any]) -> None:
        settle_seed(config)

    def drawing(self, config: LoraConfig) -> AbstractContextManager[None]:
        return drawn_from(config.init_seed)

    def check_config(self, adapter_name: str, config: LoraConfig) -> None:
        start_of(config.init_lora_weights)
        variant_of(config)
        check_megatron(config)
        if config.alora_invocation_tokens and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"aLoRA does not work on {type(self.model).__name__}, an encoder-decoder.")
        for name, other in self.configs.items():
            if name == adapter_name:
                continue
            if bool(getattr(other, "kasa_config", None)) != bool(config.kasa_config):
                one, no = (adapter_name, name) if config.kasa_config else (name, adapter_name)
                raise ValueError(f"KaSA changes base weights, so all use it or none: {one!r} does, {no!r} does not.")
            if config.layer_replication and not same_stack(config, other):
                raise ValueError(f"layer_replication of {name!r} is another one, and all adapters need the same.")

    def check_plan(self, plan: Plan, config: LoraConfig) -> None:
        if config.lora_bias:
            plan.warn_of_no_bias("lora_bias")

    def layer_settings(self, config: LoraConfig, key: str) -> dict[str, Any]:
        return {"key": key}

    def make_layer(self, config: LoraConfig, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        base = base_of(target)
        for kind, layer_class in config._custom_modules.items() if parameter_name is None else ():
            if isinstance(base, kind):
                return layer_class(target, None)  # the adapter comes by `update_layer`
        op = base_op(base, parameter_name)
        if op is None:
            raise ValueError(f"{key!r} is a {type(base).__name__}, which LoRA does not know.")
        made: Any = linear_class(base) if op.kind == "Linear" else LAYERS[op.kind]
        # in this order, for some replace the constructor
        return made(target, op=op) if parameter_name is None else made(target, None, parameter_name, None, op=op)

    def add(self, layer: Any, adapter_name: str, config: LoraConfig, key: str, planned: Any) -> None:
        own = config.at(key)
        layer.update_layer(adapter_name, own.r, own.lora_alpha, config=config, target_name=key, planned=planned)

    def without_start(
        self, adapter_name: str, tensors: dict[str, Tensor], content: dict[str, Any], initial: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        # What the layers started with: tutorials have the configuration say True by now.
        layers = (layer for layer in self.tuner.adapter_layers() if isinstance(layer, LoraLayer))
        starts = [layer.lora_start.get(adapter_name) for layer in layers]
        variant = variant_of(self.configs[adapter_name])
        if not any(start is not None and start.takes_product for start in starts):
            return super().without_start(adapter_name, tensors, content, initial)
        if variant is not None and not isinstance(variant, Dora):
            raise ValueError(
                f"path_initial_model_for_weight_conversion is for plain LoRA and DoRA; adapter {adapter_name!r} uses"
                f" {variant.label}, of which there is no such sum. Save without it."
            )
        factors = {key: value for key, value in tensors.items() if key.endswith(FACTOR_KEYS)}
        other = [key for key, value in factors.items() if key not in initial or initial[key].shape != value.shape]
        if other:
            raise ValueError(
                f"path_initial_model_for_weight_conversion must hold adapter {adapter_name!r} as it was before"
                f" training, but what is there has no {other[0]!r} of shape {list(factors[other[0]].shape)}."
            )
        # W_0 + s B A = W + s (B A - B_0 A_0), so the ranks lie side by side; the scale stays what it is, and so do the
        # lengths of DoRA, which are those of the sum.
        for key, value in factors.items():
            before = initial[key].to(value)
            is_a = "lora_A" in key or "lora_embedding_A" in key
            tensors[key] = torch.cat((value, before)) if is_a else torch.cat((value, -before), dim=1)
        wider = 2**0.5 if content["use_rslora"] else 2
        content = {**content, "init_lora_weights": True, "r": 2 * content["r"]}
        content |= {"corda_config": None, "lora_ga_config": None}
        content.pop("init_seed", None)
        content["lora_alpha"] *= wider
        content["rank_pattern"] = {key: 2 * r for key, r in (content["rank_pattern"] or {}).items()}
        content["alpha_pattern"] = {key: wider * alpha for key, alpha in (content["alpha_pattern"] or {}).items()}
        return tensors, content

    # ---- adapters that are called for by tokens

    def added(self, adapter_name: str) -> None:
        watch = Invocations(self)
        self.watch_calls(bool(watch.tokens()), watch.before, watch.after)

    removed = added

    @contextmanager
    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        watch = Invocations(self)
        facts = watch.prompt(prompt) if watch.tokens() else {}
        with super().around_generate(args, kwargs), calling(**facts):
            yield

    def check_before_training(self) -> None:
        for name in self.tuner.active_adapters:
            config = self.configs.get(name)
            by_eva = isinstance(config, LoraConfig) and config.init_lora_weights == "eva"
            if by_eva and not hasattr(config, "_said_by") and "_eva_has_run" not in config.__dict__:
                warn(
                    f"Adapter {name!r} is trained from A and B as they start by default: init_lora_weights='eva' has no"
                    " effect before initialize_lora_eva_weights(model, dataloader)."
                )

    # ---- losses

    def kasa_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """The penalties of KaSA, to be added to the loss: their sum over all layers; 0 where no adapter has any.

        Args:
            adapter_names: of which adapters; the active ones if None.
        """
        return sum(self._penalties(Kasa, adapter_names), 0.0)

    def monteclora_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """What MonteCLoRA adds to the loss in training: the mean over all layers; 0 where no adapter has any.

        Args:
            adapter_names: of which adapters; the active ones if None.
        """
        losses = self._penalties(Monteclora, adapter_names)
        return sum(losses, 0.0) / max(len(losses), 1)

    def _penalties(self, kind: type[Variant], adapter_names: str | Sequence[str] | None) -> list[Tensor | float]:
        """What a variant adds to the loss, for each layer and adapter that has it."""
        names = self.tuner.active_adapters if adapter_names is None else self.tuner.check_names(adapter_names)
        layers = [layer for layer in self.tuner.adapter_layers() if isinstance(layer, LoraLayer)]
        found = ((layer, name, layer.lora_variant.get(name)) for layer in layers for name in names)
        return [variant.penalty(layer, name) for layer, name, variant in found if isinstance(variant, kind)]

    def tie(self, layer: AdapterLayer, to: AdapterLayer, adapter_name: str) -> None:
        if not isinstance(to, Embedding) or not isinstance(layer, (Embedding, Linear)):
            return super().tie(layer, to, adapter_name)
        if isinstance(layer, Embedding):
            layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name] = to.factors(adapter_name)
        else:
            layer.lora_A[adapter_name] = TiedFactor(to.lora_embedding_B, adapter_name)
            layer.lora_B[adapter_name] = TiedFactor(to.lora_embedding_A, adapter_name)
        for setting in ("r", "lora_alpha", "scaling"):
            getattr(layer, setting)[adapter_name] = getattr(to, setting)[adapter_name]

    def prepare_model(self, config: LoraConfig, model: nn.Module) -> Callable[[], None] | None:
        if not config.layer_replication or any(same_stack(config, other) for other in self.configs.values()):
            return None  # nothing to do, or done for another adapter
        return replicate_layers(model, config.layer_replication)


class LoraModel(BaseTuner, layer=LoraLayer, method=LoraMethod, prefix="lora_"):
    """A model with LoRA adapters on its layers (arXiv:2106.09685)."""

    # the names that huggingface/peft has for them
    _get_kasa_loss = property(lambda self: self.kasa_loss)
    _get_monteclora_loss = property(lambda self: self.monteclora_loss)
