"""The settings of a mixture of LoRA adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.errors import warn
from peft.registry import PeftType
from peft.values import Fraction, PositiveFloat, PositiveInt


@dataclass
class XLoraConfig(PeftConfig, peft_type=PeftType.XLORA):
    """A mixture of LoRA adapters, the experts (X-LoRA, arXiv:2402.07148).

    A first pass of the model gives the last hidden state of each token; a classifier makes of it a weight for each
    expert, and in the second pass y = W x + g sum_e w_e s_e B_e A_e x, with weights w_e for each token (and layer). The
    classifier is what is trained. Needs a decoder of transformers with `use_cache=False`: the experts that a token gets
    change its keys and values.

    Args:
        hidden_size: width of the model's hidden states; read from the model if None.
        adapters: name of each expert -> folder or hub repository of a saved LoRA. A saved X-LoRA has its experts along,
            in subfolders of these names; where a file names other places, pass `adapters=...` to load from there.
        enable_softmax: make the weights of a token sum to one.
        enable_softmax_topk: the same, over the experts that `top_k_lora` has left; instead of `enable_softmax`.
        layerwise_scalings: weights of their own for each adapted layer.
        xlora_depth: linear layers of the classifier.
        xlora_size: width between them.
        xlora_dropout_p: probability of dropout between them.
        use_trainable_adapters: train the experts too.
        softmax_temperature: what the classifier's outputs are divided by before `enable_softmax`.
        top_k_lora: how many experts a token gets, those of the largest weights; all if None.
        scaling_pass_value: the weight of every expert in the first pass.
        global_scaling_weight: g, a factor on all weights in the second.

    Raises:
        ValueError: a number that is out of range.
    """

    hidden_size: PositiveInt | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: PositiveInt = 1
    xlora_size: PositiveInt = 2048
    xlora_dropout_p: Fraction = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: PositiveFloat = 1.0
    top_k_lora: PositiveInt | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def check(self) -> None:
        self.adapters = dict(self.adapters or {})
        self._saved_in: tuple[str, dict[str, Any]] | None = None
        self.check_top_k()
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("enable_softmax_topk without top_k_lora is a softmax over all experts.")
        if self.enable_softmax_topk and self.enable_softmax:
            warn("enable_softmax_topk is a second softmax, which evens weights out; set enable_softmax=False.")

    def check_top_k(self) -> None:
        """Raises ValueError where `top_k_lora` is more than there are experts, if those are given."""
        if self.top_k_lora is not None and self.adapters and self.top_k_lora > len(self.adapters):
            raise ValueError(f"top_k_lora={self.top_k_lora} is more than there are adapters ({len(self.adapters)}).")

    def was_read(self, source: str | os.PathLike, options: Mapping[str, Any]) -> None:
        if options.get("adapters") is not None:
            self.adapters = dict(options["adapters"])
            self.__dict__.pop("_said_by", None)  # the caller has named the places
        else:
            self._saved_in = os.fspath(source), dict(options)
