"""Adaption prompt (LLaMA-Adapter): upper attention layers look at a trained prompt too, through a gate."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core.injection import Before
from peft.core.model_config import model_config_of
from peft.core.part import check_adapter_name, trained_in
from peft.core.storage import place_of
from peft.core.storage.sharded import agree, average_gradients
from peft.core.storage.shared import shape_of
from peft.core.targets import ends_with, model_modules
from peft.core.tensor_parallel import check_heads
from peft.core.tuner import BaseTuner
from peft.core.undo import undone_on_error
from peft.core.walk import get_submodules, put_back
from peft.core.whole import whole
from peft.registry import PeftType

#: model type -> name of its attention modules
ATTENTION_OF = {
    "gpt2": "attn",
    "llama": "self_attn",
    "mistral": "self_attn",
    "qwen2": "self_attn",
    "qwen2_moe": "self_attn",
    "qwen3": "self_attn",
    "qwen3_moe": "self_attn",
}
#: what an adapter has in each layer
_TENSORS = ("adaption_prompt", "adaption_gate")


@dataclass
class AdaptionPromptConfig(PeftConfig, peft_type=PeftType.ADAPTION_PROMPT):
    """Adaption prompt (arXiv:2303.16199), for Llama, Mistral, Qwen and GPT-2.

    Args:
        target_modules: name of the attention modules; that of the model type if None.
        adapter_len: length of the prompt, in tokens.
        adapter_layers: how many layers have one, counted from the top.

    Raises:
        ValueError: numbers that are not positive.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    beyond_reference: ClassVar[frozenset[str]] = frozenset()

    positive_fields = ("adapter_len", "adapter_layers")

    @property
    def is_adaption_prompt(self) -> bool:
        return True


class AdaptedAttention(nn.Module):
    """An attention module with a prompt: y = attention(x) + g softmax(q(x) k(P)^T / sqrt(d)) v(P), through the output
    projection (arXiv:2303.16199).

    q, k and v are the module's own projections, P is `adaption_prompt` [1, length, width] and g `adaption_gate` [1],
    both of the active adapter; those of the others wait in `kept`. GPT-2's prompt goes past the output projection.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.kept = nn.ModuleDict()
        self.active: str | None = None
        self.disabled = False
        for name in _TENSORS:
            self.register_parameter(name, None)

    @property
    def wrapped(self) -> nn.Module:
        """The attention module that this one stands for."""
        return self.model

    def add(self, name: str, length: int, autocast: bool) -> None:
        """Makes the tensors of an adapter, without effect at the start."""
        projection: Any = self.model.c_attn if self.fused else self.model.k_proj
        device, dtype = place_of(projection)
        dtype = trained_in(dtype, autocast)
        width = shape_of(projection.weight)[0] if self.fused else projection.in_features
        prompt, gate = torch.randn(1, length, width, device=device), torch.zeros(1, device=device)
        self.kept[name] = nn.ParameterDict({"adaption_prompt": prompt.to(dtype), "adaption_gate": gate.to(dtype)})

    def select(self, name: str | None) -> None:
        """Makes an adapter the active one; None, or one that this layer does not have, leaves none."""
        if self.active is not None:
            self.kept[self.active] = nn.ParameterDict({slot: getattr(self, slot) for slot in _TENSORS})
        self.active = name if name is not None and name in self.kept else None
        tensors: Any = self.kept.pop(self.active) if self.active is not None else dict.fromkeys(_TENSORS)
        for slot in _TENSORS:
            self.register_parameter(slot, tensors[slot])

    def has(self, name: str) -> bool:
        """Whether this layer has an adapter of that name."""
        return name in (self.active, *self.kept)

    def tensors(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's tensors by their live names below this module."""
        if name == self.active:
            return {slot: getattr(self, slot) for slot in _TENSORS}
        kept: Any = self.kept[name] if self.has(name) else {}
        return {f"kept.{name}.{slot}": kept[slot] for slot in kept}

    @property
    def fused(self) -> bool:
        """Whether one projection makes queries, keys and values, as in GPT-2."""
        return hasattr(self.model, "c_attn")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if self.active is None or self.disabled:
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        places = kwargs.get("position_embeddings", args[1] if len(args) > 1 and not self.fused else None)
        first = output[0]
        return (first + self._look(hidden, places).to(first.dtype), *output[1:])

    def _look(self, hidden: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the prompt adds for `hidden` [batch, length, width], at places with these rotary embeddings."""
        attention: Any = self.model
        prompt = self.adaption_prompt.to(hidden.dtype)
        if self.fused:
            query = attention.c_attn(hidden).split(attention.split_size, dim=2)[0]
            _, keys, values = attention.c_attn(prompt).split(attention.split_size, dim=2)
        else:
            query, keys, values = attention.q_proj(hidden), attention.k_proj(prompt), attention.v_proj(prompt)
        query, keys, values = (part.unflatten(-1, (-1, attention.head_dim)) for part in (query, keys, values))
        if hasattr(attention, "q_norm"):
            query, keys = attention.q_norm(query), attention.k_norm(keys)
        query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
        if places is not None:
            rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
            query = rotate(query, query, *places)[0]
        groups = query.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        scores = (query @ keys.transpose(2, 3) / attention.head_dim**0.5).float().softmax(-1)
        seen = (self.adaption_gate * scores).to(values.dtype) @ values
        seen = seen.transpose(1, 2).flatten(2)
        return seen if self.fused else attention.o_proj(seen)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class AdaptionPromptModel(BaseTuner):
    """A model with prompts in its upper attention layers; one adapter is active at a time."""

    prefix = "adaption_"
    injectable = False

    def attentions(self) -> Iterator[tuple[str, AdaptedAttention]]:
        """The attention modules with adapters, by name."""
        return ((key, part) for key, part in self.model.named_modules() if isinstance(part, AdaptedAttention))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        config: Any = None,
    ) -> None:
        """Adds an adapter; the first one becomes active.

        Raises:
            ValueError: another type of model, no lengths, or more layers than there are.
        """
        config = config or self.peft_config[adapter_name]
        check_adapter_name(adapter_name)
        model_type = model_config_of(model).get("model_type")
        if model_type not in ATTENTION_OF:
            raise ValueError(
                f"Unsupported model type for adaption prompt: {model_type!r}; use one of {', '.join(ATTENTION_OF)}."
            )
        for name in ("adapter_len", "adapter_layers"):
            if getattr(config, name) is None:
                raise ValueError(f"AdaptionPromptConfig needs {name}; got None.")
        check_heads(model, "ADAPTION_PROMPT")
        target = config.target_modules or ATTENTION_OF[model_type]
        keys = [key for key, _ in model_modules(model) if ends_with(key, {target})]
        if len(keys) < config.adapter_layers:
            raise ValueError(
                f"adapter_layers={config.adapter_layers}, but the model has only {len(keys)} layers with {target!r}."
            )
        config.target_modules = target
        before = Before(self, model)
        with undone_on_error(lambda: self._take_back(model, adapter_name, before)):
            if not self.peft_config:
                model.requires_grad_(False)
            for key in keys[-config.adapter_layers :]:
                parent, module, name = get_submodules(model, key)
                if not isinstance(module, AdaptedAttention):
                    self._replace_module(parent, name, module := AdaptedAttention(module), module)
                module.add(adapter_name, config.adapter_len, autocast_adapter_dtype)
                self.targeted_module_names = list(dict.fromkeys((*self.targeted_module_names, key)))
            new = [attention.tensors(adapter_name).values() for _, attention in self.attentions()]
            agree((tensor for tensors in new for tensor in tensors), model)
            average_gradients(model)
            self.peft_config[adapter_name] = config
            active = self.active_adapters or [adapter_name]
            self.set_adapter(active, self.peft_config[active[0]].inference_mode)
            model.peft_config = self.peft_config  # type: ignore[assignment]

    def _take_back(self, model: nn.Module, adapter_name: str, before: Before) -> None:
        self.peft_config.pop(adapter_name, None)
        for key, attention in list(self.attentions()):
            if attention.active == adapter_name:
                attention.select(None)
            if attention.has(adapter_name):
                del attention.kept[adapter_name]
            if attention.active is None and not len(attention.kept):
                put_back(model, key, attention.model)
        before.restore(self, model)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes an adapter the active one; trainable unless `inference_mode`, the others not.

        Raises:
            ValueError: there is no such adapter, or several are named.
        """
        names = self.check_names(adapter_name)
        if len(names) != 1:
            raise ValueError(f"Only one adaption prompt can be active at a time, got {', '.join(names) or 'none'}.")
        with self._whole():
            self._active = names
            for _, attention in self.attentions():
                attention.select(names[0])
            for name in self.peft_config:
                self.set_requires_grad(name, name == names[0] and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in self.check_names(adapter_names):
            for _, attention in self.attentions():
                for parameter in attention.tensors(name).values():
                    parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        with self._whole():
            super().delete_adapter(adapter_name)
            for _, attention in self.attentions():
                attention.select(None)
                if attention.has(adapter_name):
                    del attention.kept[adapter_name]
            if self.active_adapters:
                self.set_adapter(self.active_adapters, self.peft_config[self.active_adapters[0]].inference_mode)

    def _switch(self, on: bool) -> None:
        with self._whole():
            for _, attention in self.attentions():
                attention.disabled = not on

    def _whole(self) -> AbstractContextManager[None]:
        places = [place for _, attention in self.attentions() for place in (attention, attention.kept)]
        return whole(self, (), None, [*places, *(attention.__dict__ for _, attention in self.attentions())])

    @property
    def disabled(self) -> bool:
        return any(attention.disabled for _, attention in self.attentions())

    def _check_merge(self, adapter_names: Sequence[str] | None) -> None:
        raise NotImplementedError("An adaption prompt is no change of weights and cannot be merged.")

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        for key, attention in list(self.attentions()):
            put_back(self.model, key, attention.model)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def key_map(self, adapter_name: str) -> dict[str, str]:
        return {
            f"model.{key}.{live.rpartition('.')[2]}": f"model.{key}.{live}"
            for key, attention in self.attentions()
            for live in attention.tensors(adapter_name)
        }
