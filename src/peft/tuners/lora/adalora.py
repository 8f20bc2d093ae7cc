"""Low-rank adaptation with a budget of ranks that is shared out in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.base_op import BaseOp, ConvOp
from peft.core.change import LowRank
from peft.core.method import Method
from peft.core.slots import Setting, Slot
from peft.core.storage.flat import bring_together, read_in_units
from peft.core.storage.shared import put, whole, with_gradient
from peft.core.tuner import BaseTuner
from peft.core.walk import in_files, layers_of
from peft.errors import warn
from peft.ops.rank_budget import budget_at, kept_ranks, orthogonality_gap, track_sensitivity, triplet_scores
from peft.registry import PeftType
from peft.tuners.lora.base import DropoutLayer
from peft.tuners.lora.config import LoraConfig
from peft.values import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt

_SLOTS = ("lora_A", "lora_E", "lora_B")


@dataclass
class AdaLoraConfig(LoraConfig, peft_type=PeftType.ADALORA):
    """Adaptive budget allocation (arXiv:2303.10512): W' = W + lora_alpha / init_r * B (E * A).

    A [r, in] and B [out, r] are kept near to orthonormal by a penalty in the loss; E [r, 1] takes the part of singular
    values. In training, `update_and_allocate` sets those entries of E to zero whose loss costs least, until `target_r`
    ranks a module are left on average.

    Args:
        target_r: mean rank in the end.
        init_r: rank of every module in the beginning.
        tinit: steps before the first rank is dropped.
        tfinal: steps at the end in which the ranks stay as they are.
        deltaT: steps between two allocations.
        beta1, beta2: decay of the moving averages of sensitivity and of its uncertainty.
        orth_reg_weight: weight of the penalty in the loss.
        total_step: training steps in all; has to be given.
        rank_pattern: the ranks that were kept: name of an E -> a truth value for each rank.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the adapter's input.
        init_lora_weights: start E at zero, without effect; False starts all at random.
        trainable_token_indices: rows of the embedding to train as well.
        ensure_weight_tying: keep what is trained of tied modules the same.

    The other fields are LoRA's and without effect; setting one warns.
    """

    target_r: NonNegativeInt = 8
    init_r: PositiveInt = 12
    tinit: NonNegativeInt = 0
    tfinal: NonNegativeInt = 0
    deltaT: PositiveInt = 1
    beta1: Fraction = 0.85
    beta2: Fraction = 0.85
    orth_reg_weight: NonNegativeFloat = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    lora_alpha: NonNegativeFloat = 8
    lora_dropout: Fraction = 0.0

    pattern_fields: ClassVar[dict[str, str]] = {}
    #: fields of LoRA without effect
    idle: ClassVar[set[str]] = {one.name for one in fields(LoraConfig)} - {one.name for one in fields(LayoutConfig)} - {
        "rank_pattern", "lora_alpha", "lora_dropout", "init_lora_weights", "trainable_token_indices",
        "ensure_weight_tying",
    }  # fmt: skip

    def check(self) -> None:
        super().check()
        for name, what in (("use_dora", "DoRA"), ("loftq_config", "LoftQ"), ("layer_replication", "layer_replication")):
            if getattr(self, name):
                raise ValueError(f"AdaLoRA does not support {what} ({name}={getattr(self, name)!r}).")
        if self.total_step is None or self.total_step < 1:
            raise ValueError(f"AdaLoRA needs total_step, the number of training steps, got {self.total_step}.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(f"tinit={self.tinit} and tfinal={self.tfinal} leave none of total_step={self.total_step}.")
        self.alpha_pattern = self.alpha_pattern or {}
        idle = [name for name in sorted(self.idle) if not self._is_default(name)]
        if idle:
            hint = " (the rank is set by init_r and target_r)" if "r" in idle else ""
            warn(f"AdaLoRA makes no use of {', '.join(idle)}{hint}.")
        self._allocated = self.rank_pattern is not None

    def to_json_dict(self) -> dict[str, Any]:
        # While ranks are still being allocated, files hold all of them, so that training can go on from there.
        content = super().to_json_dict()
        return content if self._allocated else {**content, "rank_pattern": None}


class AdaLoraLayer(DropoutLayer):
    """A module with a low-rank change in the form of a singular value decomposition.

    `ranknum` [1] is the rank that the scale counts with; it stays when ranks are dropped.
    """

    lora_A = Slot()
    lora_B = Slot()
    lora_E = Slot()
    ranknum = Slot(trained=False, stored=False)

    r = Setting[int]("init_r")

    def create(self, name: str, config: AdaLoraConfig) -> None:
        r = config.init_r
        self.make_dropout(name, config)
        for slot, shape in zip(_SLOTS, self.shapes(r), strict=True):
            getattr(self, slot)[name] = nn.Parameter(torch.randn(shape))
        torch.randn(1)  # one more number, so that a seed means the values that it means to huggingface/peft
        if config.init_lora_weights:
            nn.init.zeros_(self.lora_E[name])
            nn.init.normal_(self.lora_A[name], std=0.02)
            nn.init.normal_(self.lora_B[name], std=0.02)

    def initial_scaling(self, name: str) -> float:
        return self.lora_alpha[name] or float(self.configs[name].init_r)

    def draw(self, name: str, config: AdaLoraConfig) -> None:
        self.ranknum[name] = nn.Parameter(torch.full((1,), float(self.r[name])), requires_grad=False)

    def shapes(self, r: int) -> tuple[tuple[int, int], ...]:
        """Those of A, E and B."""
        return (r, self.in_features), (r, 1), (self.out_features, r)

    def fit(self, name: str, path: str, find: Callable[[str], Tensor | None]) -> None:
        kept = find("lora_E")  # of the ranks that are dropped, a file holds nothing; the scale stays
        if kept is not None and kept.ndim and len(kept) != self.r[name]:
            self.r[name] = len(kept)
            for slot, shape in zip(_SLOTS, self.shapes(len(kept)), strict=True):
                self.renew(slot, name, shape)

    def change(self, name: str) -> LowRank:
        scale = self.scaling[name] / (self.ranknum[name].to(self.lora_E[name].dtype) + 1e-5)
        down = self.lora_A[name] * (self.lora_E[name] * scale)
        return LowRank(down, self.lora_B[name], dropout=self.dropout_of(name))

    @classmethod
    def check(cls, config: AdaLoraConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        if config.lora_dropout and not op.linear and not isinstance(op, ConvOp):
            raise ValueError(f"lora_dropout needs linear layers or convolutions; {key!r} is a {op.kind}.")


class RankAllocator:
    """Shares out the budget of ranks among the modules of a model.

    Args:
        model: a model with AdaLoRA layers.
        peft_config: the schedule.
        adapter_name: the adapter that is trained.
    """

    def __init__(self, model: nn.Module, peft_config: AdaLoraConfig, adapter_name: str):
        self.peft_config, self.adapter_name = peft_config, adapter_name
        self.reset_ipt()
        layers = self._layers(model).values()
        self.init_bgt = sum(layer.r[adapter_name] for layer in layers)
        self.target_bgt = peft_config.target_r * len(layers)

    def _layers(self, model: nn.Module) -> dict[str, AdaLoraLayer]:
        """The layers with the adapter, by the names that they have in files."""
        found = layers_of(model, AdaLoraLayer, self.adapter_name)
        return {in_files(model, self.adapter_name, path): layer for path, layer in found.items()}

    def set_total_step(self, total_step: int) -> None:
        """Sets the number of training steps."""
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forgets all sensitivities."""
        self.exp_avg_ipt: dict[str, Tensor] = {}
        self.exp_avg_unc: dict[str, Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """(ranks to keep at a step, whether they are allocated anew then)."""
        config = self.peft_config
        last = (config.total_step or 0) - config.tfinal
        budget = budget_at(step, config.tinit, last, self.init_bgt, self.target_bgt)
        return budget, step > config.tinit and (step > last or step % config.deltaT == 0)

    def update_ipt(self, model: nn.Module) -> None:
        """Takes the gradients of a step into account.

        Raises:
            ValueError: there are none.
        """
        name = self.adapter_name
        tensors = {
            f"{path}.{slot}.{name}": with_gradient(getattr(layer, slot)[name])
            for path, layer in self._layers(model).items()
            for slot in _SLOTS
        }
        if any(tensor.dim() != 2 for tensor, _ in tensors.values()):
            raise RuntimeError(
                "FullyShardedDataParallel has AdaLoRA's tensors and their gradients in parts: call"
                " update_and_allocate() with the wrapped model, on all processes, inside `with"
                " FullyShardedDataParallel.summon_full_params(model, writeback=True, with_grads=True):`."
            )
        if all(gradient is None for _, gradient in tensors.values()):
            raise ValueError(
                f"Adapter {name!r} has no gradients: update_and_allocate() has to come after backward()"
                " and before zero_grad(), with DeepSpeed before step()."
            )
        with torch.no_grad():
            for key, (tensor, gradient) in tensors.items():
                mean = self.exp_avg_ipt.setdefault(key, torch.zeros_like(tensor))
                spread = self.exp_avg_unc.setdefault(key, torch.zeros_like(tensor))
                if gradient is not None:
                    track_sensitivity(mean, spread, tensor, gradient, self.peft_config.beta1, self.peft_config.beta2)

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Sets E to zero at all but the `budget` most important ranks; returns which are kept, by name of the E."""
        name, layers = self.adapter_name, self._layers(model)

        def importance(key: str) -> Tensor:
            return whole(self.exp_avg_ipt[key] * self.exp_avg_unc[key])

        scores = [triplet_scores(*(importance(f"{path}.{slot}.{name}") for slot in _SLOTS)) for path in layers]
        masks = zip(layers, kept_ranks(scores, budget), strict=True)
        pattern = {f"{path}.lora_E.{name}": mask.tolist() for path, mask in masks}
        self.mask_using_rank_pattern(model, pattern)
        return pattern

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """(budget, which ranks are kept if that was decided anew) at a training step."""
        if global_step < (self.peft_config.total_step or 0) - self.peft_config.tfinal:
            self.update_ipt(model)
        budget, due = self.budget_schedule(global_step)
        return budget, self.mask_to_budget(model, budget) if due or force_mask else None

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: Mapping[str, Iterable[bool]]) -> None:
        """Sets E to zero at the ranks that are not kept."""
        with torch.no_grad():
            for path, layer in self._layers(model).items():
                e, name = layer.lora_E[self.adapter_name], f"{path}.lora_E"
                kept = rank_pattern.get(f"{name}.{self.adapter_name}", rank_pattern.get(name))
                if kept is not None:
                    lost = ~torch.tensor(list(kept), dtype=torch.bool, device=e.device)[:, None]
                    put(e, whole(e).masked_fill(lost, 0.0))


class AdaLoraMethod(Method):
    """The schedules of ranks of the adapters that are trained, and the penalty that keeps A and B near to orthonormal.

    A forward pass adds the penalty to the loss of the model's output.
    """

    @cached_property
    def allocators(self) -> dict[str, RankAllocator]:
        """What shares out the ranks of each adapter that is trained: of one, but in a mixed model."""
        return {}

    @property
    def trainable_adapter_name(self) -> str | None:
        """The adapter that was added last to be trained."""
        return next(reversed(self.allocators), None)

    @property
    def rankallocator(self) -> RankAllocator:
        """What shares out the ranks of that adapter."""
        return self.allocators[str(self.trainable_adapter_name)]

    def _scheduled(self) -> list[str]:
        """The adapters that have a schedule; of several, those that are active."""
        names = [name for name in self.allocators if name in self.configs]
        return names if len(names) < 2 else [name for name in names if name in self.tuner.active_adapters]

    def check_config(self, adapter_name: str, config: AdaLoraConfig) -> None:
        others = [name for name, other in self.configs.items() if name != adapter_name and not other.inference_mode]
        if others and not config.inference_mode and isinstance(self.tuner, AdaLoraModel):
            raise ValueError(
                f"AdaLoraModel supports only 1 trainable adapter, and {others[0]!r} is one already; set"
                " inference_mode=True for all others."
            )

    def added(self, adapter_name: str) -> None:
        config, known = self.configs[adapter_name], self.allocators.get(adapter_name)
        if not config.inference_mode and (known is None or known.peft_config is not config):
            if isinstance(self.tuner, AdaLoraModel):
                self.allocators.clear()
            self.allocators[adapter_name] = RankAllocator(self.model, config, adapter_name)

    def after_forward(self, output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and not self.tuner.disabled:
            for name in self._scheduled():
                loss = loss + self._penalty(name).to(loss.device)
            output.loss = loss
        return output

    def _penalty(self, name: str) -> Tensor:
        """How far A and B of an adapter are from orthonormal, times its weight in the loss."""
        layers = [layer for layer in self.tuner.adapter_layers() if isinstance(layer, AdaLoraLayer) and layer.has(name)]
        bring_together(self.tuner, (p for layer in layers for p in layer.tensors(name)))
        factors = read_in_units(
            self.tuner, layers, lambda layer: [whole(layer.lora_A[name]), whole(layer.lora_B[name]).T]
        )
        return self.configs[name].orth_reg_weight * orthogonality_gap(factors)

    def update_and_allocate(self, global_step: int) -> None:
        """Shares out the ranks; to be called in every training step, after `backward()` and before `zero_grad()`.

        Args:
            global_step: number of the step, from 0.

        Raises:
            ValueError: no adapter is trained, or there are no gradients.
        """
        names = self._scheduled()
        if not names:
            raise ValueError("update_and_allocate() needs a trainable adapter; all are in inference mode.")
        for name in names:
            config, allocator = self.configs[name], self.allocators[name]
            last = config.total_step - config.tfinal
            if global_step > last:
                # The optimiser moves the dropped ranks too, so they are set to zero again.
                allocator.mask_using_rank_pattern(self.model, config.rank_pattern or {})
                continue
            _, pattern = allocator.update_and_allocate(self.model, global_step, force_mask=global_step == last)
            if pattern is not None:
                config.rank_pattern, config._allocated = pattern, global_step == last
            if global_step == last:
                allocator.reset_ipt()

    @classmethod
    def write_tensors(cls, model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out the ranks that are not kept, once that is settled."""
        config: Any = model.peft_config[adapter_name]  # type: ignore[index]
        if not config._allocated:
            return tensors
        end = f".{adapter_name}"
        config.rank_pattern = {name.removesuffix(end): kept for name, kept in config.rank_pattern.items()}
        for name, kept in config.rank_pattern.items():
            # Models that adapters were put into directly have no `base_model.model` in their names.
            key = next((key for key in (name, f"base_model.model.{name}") if key in tensors), None)
            if key is None or not tensors[key].ndim or len(tensors[key]) != len(kept):
                continue  # read from a file that has left them out already
            index = torch.tensor(kept, dtype=torch.bool, device=tensors[key].device)
            for slot in _SLOTS:
                own = key.removesuffix("lora_E") + slot
                tensors[own] = tensors[own][:, index] if slot == "lora_B" else tensors[own][index]
        return tensors


class AdaLoraModel(BaseTuner, layer=AdaLoraLayer, method=AdaLoraMethod, prefix="lora_"):
    """A model with AdaLoRA adapters, one of which may be trained."""
