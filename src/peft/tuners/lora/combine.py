"""LoRA adapters combined into a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import copysign, sqrt
from typing import Any

import torch
from torch import Tensor

from peft.core.combine import add_combined, check_combination, combined_config, layers_with
from peft.core.method import Method
from peft.core.part import as_names
from peft.ops.merging import (
    SignMethod,
    clamp_to_quantile,
    combine,
    svd_of_product,
)
from peft.ops.principal import truncated_svd, unrounded
from peft.tuners.lora.factors import adapter_rank, block_rank, check_own, check_plain, load, product, store

_ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
#: "cat" puts the factors side by side; those on the product decompose it again
COMBINATIONS = (*_ON_FACTORS, "cat", "svd", *(f"{name}_svd" for name in _ON_FACTORS[1:]))


@dataclass(frozen=True)
class Combination:
    """How to combine: what [`LoraModel.add_weighted_adapter`] is called with.

    Raises:
        ValueError, RuntimeError: there is no such combination, or something it needs is missing or out of range.
    """

    name: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: SignMethod = "total"

    def __post_init__(self) -> None:
        if self.name not in COMBINATIONS:
            raise ValueError(f"Unknown combination_type {self.name!r}; use one of {', '.join(COMBINATIONS)}.")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank must be a positive integer, got {self.svd_rank}.")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp must be a quantile (0 to 1), got {self.svd_clamp}.")

    @property
    def on_product(self) -> bool:
        """Whether the changes of the weight are combined, rather than the factors that they are made of."""
        return self.name.endswith("svd")

    @property
    def method(self) -> str:
        """What is done with the tensors: "cat", or a method of [`combine`]."""
        return self.name.removesuffix("_svd").replace("svd", "linear")

    def of(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Tensors of one kind combined."""
        method = "linear" if self.method == "cat" else self.method
        return combine(tensors, weights, method, self.density, self.majority_sign_method)


class Combining(Method):
    """A method whose adapters can be combined: LoRA."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
    ) -> None:
        """Adds an adapter that combines others; it is not active yet. A call that raises changes nothing.

        Args:
            adapters: names of the adapters to combine. One of them at most may have `modules_to_save` or
                `trainable_token_indices`, which the new adapter takes over as they are.
            weights: a factor for each; negative ones take an adapter's effect away.
            adapter_name: the new adapter's name.
            combination_type: `"cat"` and `"svd"` make the weighted sum of the changes that the adapters make to a
                weight: exact, with the sum of all ranks, or the nearest of rank `svd_rank`. `"linear"` sums the
                factors A and B instead, which is cheap and rough. `"ties"` (arXiv:2306.01708), `"dare_linear"`,
                `"dare_ties"` (arXiv:2311.03099) and `"magnitude_prune"` prune first; with `_svd` at the end they
                work on the changes, else on A and B. Those on A and B need adapters of the same rank.
            svd_rank: rank of the new adapter, for the svd types; the largest of the adapters' ranks if None.
            svd_clamp: quantile that no entry of the factors may pass, for the svd types.
            svd_full_matrices: has no influence on the outcome; taken for compatibility.
            svd_driver: method of `torch.linalg.svd` on CUDA.
            density: share of the entries that pruning keeps, 0 to 1.
            majority_sign_method: how `ties` and `dare_ties` elect the sign of an entry: by the sum (`"total"`) or by
                counting (`"frequency"`).

        Raises:
            ValueError: an adapter does not exist, the name is taken, ranks differ where they may not, a setting is
                out of range or missing, or an adapter is on a bare parameter.
            RuntimeError: an unknown `majority_sign_method`.
        """
        how = Combination(combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method)
        adapters, weights = check_combination(self, as_names(adapters), weights, adapter_name)
        layers: dict[Any, str] = layers_with(self, adapters)
        _check_factors(adapters, layers, how)
        configs = [self.configs[name] for name in adapters]
        if len({tuple(config.alora_invocation_tokens or ()) for config in configs}) > 1:
            raise ValueError("aLoRA adapters can be combined where all of them have the same alora_invocation_tokens.")
        largest = max(rank for config in configs for rank in (config.r, *(config.rank_pattern or {}).values()))
        if "dare" in how.name:
            start = configs[0].init_lora_weights
            _skip_start_values(adapters, layers, how.svd_rank if how.on_product and how.svd_rank else largest, start)
        tensors, ranks = {}, {}
        for layer, key in layers.items():
            here = {name: weight for name, weight in zip(adapters, weights, strict=True) if layer.has(name)}
            ranks[key], tensors[layer] = _combined(layer, here, how, key, largest)
        config = combined_config(self, adapters, layers)
        _describe(config, ranks, tensors)
        add_combined(self, adapter_name, adapters, config, tensors)


def _describe(config: Any, ranks: Mapping[str, int], tensors: Mapping[Any, dict[str, Tensor]]) -> None:
    """Lets the configuration say what the new adapter is; if one layer's B has a bias, all get one."""
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora, config.init_lora_weights = False, True
    config.lora_bias = any("lora_B.bias" in values for values in tensors.values())
    for layer, values in tensors.items() if config.lora_bias else ():
        values.setdefault("lora_B.bias", torch.zeros(layer.out_features))


def _check_factors(adapters: Sequence[str], layers: Mapping[Any, str], how: Combination) -> None:
    for layer, key in layers.items():
        ranks = {name: layer.r[name] for name in adapters if layer.has(name)}
        for name in ranks:
            check_plain(layer, name)
        if how.name not in ("linear", "cat"):
            check_own(layer)
        if not how.on_product and how.method != "cat" and len(set(ranks.values())) > 1:
            listed = ", ".join(f"{name}: r={r}" for name, r in ranks.items())
            raise ValueError(
                f"combination_type {how.name!r} needs adapters of the same r, but on {key!r} they have {listed}. Use"
                " 'cat' or one of the svd types."
            )


def _skip_start_values(adapters: Sequence[str], layers: Iterable[Any], rank: int, start: bool | str) -> None:
    """Draws the random numbers that huggingface/peft starts the new adapter with before it draws what to drop.

    So a seed drops the same entries here and there.
    """
    for layer in layers:
        name = next(name for name in adapters if layer.has(name))
        a, b = (torch.empty(factor.numel() // layer.r[name] * rank) for factor in layer.factors(name))
        normal = layer.op.kind == "Embedding"
        (a.normal_(), b.normal_()) if normal else (a.uniform_(), b.uniform_())
        if start:
            b.normal_() if normal else a.uniform_()


@torch.no_grad()
def _combined(
    layer: Any, here: Mapping[str, float], how: Combination, key: str, largest: int
) -> tuple[int, dict[str, Tensor]]:
    """The combination of some adapters, whose largest rank is `largest`, on one layer: its rank and its tensors."""
    stacks = [load(layer, name) for name in here]
    scaled = [weight * float(layer.scaling[name]) for name, weight in here.items()]
    if how.on_product:
        a, b = _of_products(layer, here, stacks, scaled, how, key, largest)
    elif how.method == "cat":
        a, b = _side_by_side(stacks, scaled)
    else:  # the weights, which count once in the product, are shared out between A and B
        for_b = [sqrt(abs(s)) for s in scaled]
        for_a = [copysign(root, s) for root, s in zip(for_b, scaled, strict=True)]
        a, b = how.of([a for a, _ in stacks], for_a), how.of([b for _, b in stacks], for_b)
    tensors = store(layer, a, b)
    if any(layer.lora_bias[name] for name in here):
        tensors["lora_B.bias"] = how.of([_bias(layer, name) for name in here], scaled)
    return adapter_rank(layer, a.shape[1]), tensors


def _bias(layer: Any, name: str) -> Tensor:
    bias = layer.lora_B[name].bias
    return layer.lora_B[name].weight.new_zeros(layer.out_features) if bias is None else bias


def _side_by_side(stacks: Sequence[tuple[Tensor, Tensor]], scaled: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors whose product is the weighted sum of all products."""
    a = torch.cat([a * scale for (a, _), scale in zip(stacks, scaled, strict=True)], dim=1)
    return a, torch.cat([b for _, b in stacks], dim=2)


def _of_products(
    layer: Any,
    here: Mapping[str, float],
    stacks: Sequence[tuple[Tensor, Tensor]],
    scaled: Sequence[float],
    how: Combination,
    key: str,
    largest: int,
) -> tuple[Tensor, Tensor]:
    """The combined change of the weight, decomposed again."""
    room, ranks = min(stacks[0][0].shape[2], stacks[0][1].shape[1]), sum(a.shape[1] for a, _ in stacks)
    wanted = how.svd_rank or adapter_rank(layer, min(block_rank(layer, largest), room))
    rank = block_rank(layer, wanted)
    if adapter_rank(layer, rank) != wanted or not 1 <= rank <= room:
        raise ValueError(
            f"svd_rank={wanted} does not fit {key!r}: its weight has a rank of at most {adapter_rank(layer, room)}"
            + (f", in equal parts for {len(stacks[0][0])} groups." if len(stacks[0][0]) > 1 else ".")
        )
    if how.method == "linear" and how.svd_clamp is None and rank <= ranks <= room:
        a, b = _side_by_side([(unrounded(a), unrounded(b)) for a, b in stacks], scaled)
        u, s, vh = svd_of_product(b, a)
        return vh[:, :rank], u[..., :rank] * s[:, None, :rank]
    changes, weights = [product(layer, name) for name in here], [*here.values()]
    if layer.op.kind in ("Conv1D", "Embedding"):
        # Their weight is the matrix transposed. Entries are dropped in its order, so that a seed means the same as in
        # huggingface/peft.
        change = how.of([change.mT.contiguous() for change in changes], weights).mT
    else:
        change = how.of(changes, weights)
    u, s, a = truncated_svd(change, rank, how.svd_driver)
    b = u * s[:, None]
    if how.svd_clamp is not None:
        a, b = clamp_to_quantile([a, b], how.svd_clamp)
    return a, b
