"""Polytropon: each task mixes skills of its own choice, which are LoRA factors that all tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

from peft.config import LayerConfig
from peft.core.call import calling, fact
from peft.core.change import Beside
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.routing import Route, check_task_ids
from peft.core.slots import ModuleSlot, Slot
from peft.core.tuner import BaseTuner
from peft.ops.starts import uniform
from peft.registry import PeftType
from peft.values import Divisor, PositiveInt


@dataclass
class PolyConfig(LayerConfig, peft_type=PeftType.POLY):
    """Polytropon (arXiv:2202.13914) and multi-head routing (arXiv:2211.03831).

    Forward passes and generation need `task_ids` [batch].

    Args:
        r: rank of each skill.
        init_weights: start without effect; False starts all factors at random.
        poly_type: kind of router; only `"poly"`.
        n_tasks: number of tasks.
        n_skills: number of skills in each layer.
        n_splits: number of parts that a skill is cut into; a task chooses for each part on its own.
    """

    r: PositiveInt = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: PositiveInt = 1
    n_skills: PositiveInt = 4
    n_splits: Divisor = 1


class PolyRouter(nn.Module):
    """How much of each skill each task takes: Z = sigmoid(`module_logits`) [tasks, splits * skills], divided by its
    sum over skills. In training, the choice is drawn from the relaxed Bernoulli distribution with these logits.
    """

    def __init__(self, config: PolyConfig):
        super().__init__()
        self.shape = (config.n_splits, config.n_skills)
        self.module_logits = nn.Parameter(torch.empty(config.n_tasks, config.n_splits * config.n_skills))
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, task_ids: Tensor, rows: int) -> Tensor:
        """Shares [rows, splits, skills] for tasks [samples]; a layer may see several rows for each sample."""
        tasks = check_task_ids(task_ids, len(self.module_logits), len(task_ids)).to(self.module_logits.device)
        if not len(tasks) or rows % len(tasks):
            raise ValueError(f"task_ids has {len(tasks)} tasks, which does not fit a layer that sees {rows} rows.")
        logits = self.module_logits[tasks].unflatten(1, self.shape)
        chosen = RelaxedBernoulli(logits.new_ones(()), logits=logits).rsample() if self.training else logits.sigmoid()
        return (chosen / (chosen.sum(-1, keepdim=True) + 1e-12)).repeat_interleave(rows // len(tasks), dim=0)


class PolyLayer(AdapterLayer):
    """A linear layer with skills: y = W x + B_t A_t x / r for a sample of task t, where A_t and B_t are the sums of
    `poly_lora_A` [splits, skills, in / splits, r] and `poly_lora_B` [splits, skills, r, out / splits] over the skills,
    in the shares that `poly_router` gives.
    """

    poly_router = ModuleSlot[PolyRouter]()
    poly_lora_A = Slot()
    poly_lora_B = Slot()
    # Each sample has a weight of its own, so only what acts on the activations can be adapted.
    kinds = frozenset(("Linear", "Conv1D"))
    cannot_merge = "A Poly adapter changes the weight differently for each task and cannot be merged."

    def create(self, name: str, config: PolyConfig) -> None:
        splits, skills = config.n_splits, config.n_skills
        a = torch.empty(splits, skills, self.in_features // splits, config.r)
        b = torch.zeros(splits, skills, config.r, self.out_features // splits)
        for factor in (a,) if config.init_weights else (a, b):
            for skill in factor.transpose(0, 1):
                for part in skill:  # [in, out], the transposed weight of a linear layer
                    part.copy_(uniform(*part.T.shape).T)
        self.poly_lora_A[name], self.poly_lora_B[name] = nn.Parameter(a), nn.Parameter(b)
        self.poly_router[name] = PolyRouter(config).train(self.training)

    def change(self, name: str) -> Beside:
        return Beside(lambda x: self.mixture(name, x), self.cannot_merge)

    def mixture(self, name: str, x: Tensor) -> Tensor:
        """What the skills add to the outputs of each sample: [rows, ..., out]."""
        task_ids = fact("task_ids")
        if task_ids is None:
            raise ValueError("task_ids should not be None: Poly needs the task of each sample.")
        a, b = self.poly_lora_A[name], self.poly_lora_B[name]
        shares = self.poly_router[name](task_ids, x.shape[0]).to(a.dtype)
        a = torch.einsum("bqs,qsir->bqir", shares, a).flatten(1, 2)  # [rows, in, r]
        b = torch.einsum("bqs,qsro->bqro", shares, b).transpose(1, 2).flatten(2)  # [rows, r, out]
        flat = x.to(a.dtype).flatten(1, -2) if x.dim() > 2 else x.to(a.dtype)[:, None]
        return (flat @ a @ (b / self.r[name])).view(*x.shape[:-1], -1)

    def _forward_routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("adapter_names (a mixed batch) cannot be used with Poly; task_ids says what each sample gets.")


class PolyMethod(Method):
    """Tells the layers of a call which task each sample is of."""

    def around_forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        return calling(task_ids=kwargs.pop("task_ids", None))


class PolyModel(BaseTuner, layer=PolyLayer, method=PolyMethod, prefix="poly_"):
    """A model with Poly adapters."""
