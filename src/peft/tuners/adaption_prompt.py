"""Adaption prompt (LLaMA-Adapter): upper attention layers look at a trained prompt too, through a gate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp, BlockOp
from peft.core.call import current_route
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.model_config import model_config_of
from peft.core.plan import Plan
from peft.core.slots import Slot
from peft.core.storage.shared import shape_of
from peft.core.targets import ends_with, matching_entry
from peft.core.tensor_parallel import check_heads
from peft.core.tuner import BaseTuner
from peft.registry import PeftType
from peft.values import PositiveInt

#: model type -> name of its attention modules
ATTENTION_OF = {
    "gpt2": "attn",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "self_attn"),
}


@dataclass
class AdaptionPromptConfig(LayerConfig, peft_type=PeftType.ADAPTION_PROMPT):
    """Adaption prompt (arXiv:2303.16199), for Llama, Mistral, Qwen and GPT-2.

    Args:
        target_modules: name of the attention modules; that of the model type if None.
        adapter_len: length of the prompt, in tokens.
        adapter_layers: how many layers have one, counted from the top.
    """

    target_modules: str | None = None
    adapter_len: PositiveInt | None = None
    adapter_layers: PositiveInt | None = None

    @property
    def is_adaption_prompt(self) -> bool:
        return True


class AdaptedAttention(AdapterLayer):
    """An attention module with a prompt: y = attention(x) + g softmax(q(x) k(P)^T / sqrt(d)) v(P), through the output
    projection (arXiv:2303.16199).

    q, k and v are the module's own projections, P is in `adaption_prompts` [1, length, width] and g in
    `adaption_gates` [1]. GPT-2's prompt goes past the output projection.
    """

    adaption_prompts = Slot()
    adaption_gates = Slot()
    kinds = frozenset(("Block",))
    cannot_merge = "An adaption prompt is no change of weights and cannot be merged."

    @classmethod
    def op_of(cls, module: nn.Module, parameter_name: str | None) -> BaseOp | None:
        known = hasattr(module, "c_attn") or hasattr(module, "k_proj")
        return BlockOp(module) if known and parameter_name is None else None

    @property
    def fused(self) -> bool:
        """Whether one projection makes queries, keys and values, as in GPT-2."""
        return hasattr(self.get_base_layer(), "c_attn")

    def create(self, name: str, config: AdaptionPromptConfig) -> None:
        base = self.get_base_layer()
        width = shape_of(base.c_attn.weight)[0] if self.fused else base.k_proj.in_features
        self.adaption_prompts[name] = nn.Parameter(torch.randn(1, config.adapter_len or 0, width))
        self.adaption_gates[name] = nn.Parameter(torch.zeros(1))

    def refresh(self) -> None:
        super().refresh()
        # As in huggingface/peft, the active adapter's tensors are there without its name, too.
        here = [name for name in self._active if self.has(name)]
        self._parameters.update({slot[:-1]: getattr(self, slot)[here[0]] if here else None for slot in self.slots})

    def key_map(self, name: str) -> dict[str, str]:
        return {key[:-1]: live for key, live in super().key_map(name).items()}

    def move(self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().move(name, device, dtype)
        self.refresh()

    def loaded(self, name: str) -> None:
        self.refresh()

    def check_active(self, names: Sequence[str]) -> None:
        if len(names) > 1:
            raise ValueError(f"Only one adaption prompt can be active at a time, got {', '.join(names)}.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self._disable_adapters or not self._live:
            return output
        if current_route() is not None:
            raise ValueError("Adaption prompts cannot differ from sample to sample (adapter_names); use set_adapter().")
        if "_hf_hook" in vars(self.adaption_prompts):
            self.bring_back()
        hidden = args[0] if args else kwargs["hidden_states"]
        places = kwargs.get("position_embeddings", args[1] if len(args) > 1 and not self.fused else None)
        first = output[0]
        return (first + self.look(self._live[0], hidden, places).to(first.dtype), *output[1:])

    def look(self, name: str, hidden: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
        """What a prompt adds for `hidden` [batch, length, width], at places with these rotary embeddings."""
        attention: Any = self.base_layer
        prompt = self.adaption_prompts[name].to(hidden.dtype)
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
        seen = (self.adaption_gates[name] * scores).to(values.dtype) @ values
        seen = seen.transpose(1, 2).flatten(2)
        return seen if self.fused else attention.o_proj(seen)


class AdaptionPromptMethod(Method):
    """Which attention modules get a prompt: the upper ones."""

    def choose_targets(self, config: AdaptionPromptConfig, model_config: dict[str, Any]) -> None:
        config.target_modules = ATTENTION_OF.get(model_config.get("model_type", ""))

    def check_config(self, adapter_name: str, config: AdaptionPromptConfig) -> None:
        model_type = model_config_of(self.model).get("model_type")
        if model_type not in ATTENTION_OF:
            raise ValueError(f"Adaption prompt is for the model types {', '.join(ATTENTION_OF)}; got {model_type!r}.")
        for name in ("adapter_len", "adapter_layers"):
            if getattr(config, name) is None:
                raise ValueError(f"AdaptionPromptConfig needs {name}; got None.")
        check_heads(self.model, "ADAPTION_PROMPT")

    def check_plan(self, plan: Plan, config: AdaptionPromptConfig) -> None:
        count, wanted = len(plan.targets), config.adapter_layers or 0
        if count < wanted:
            raise ValueError(f"adapter_layers={wanted}, but there are {count} layers with {config.target_modules!r}.")
        del plan.targets[: count - wanted]


class AdaptionPromptModel(BaseTuner, layer=AdaptedAttention, method=AdaptionPromptMethod, prefix="adaption_"):
    """A model with prompts in its upper attention layers; one adapter is active at a time."""

    @staticmethod
    def _check_target_module_exists(config: AdaptionPromptConfig, key: str) -> str | None:
        """By a name, not by a regular expression for one."""
        excluded = matching_entry(config.exclude_modules, key)
        return None if excluded else ends_with(key, {config.target_modules or ""})
