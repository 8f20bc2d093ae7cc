"""Adaptive multi-subspace fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.change import Bias, Change, LowRank
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import FixedSlot, ModuleSlot, Setting
from peft.core.tuner import BaseTuner
from peft.core.walk import layers_of
from peft.ops.principal import leading_parts
from peft.ops.rank_budget import budget_at, kept_ranks, track_sensitivity
from peft.ops.subspaces import cluster_basis, cluster_rows, spread_rows
from peft.registry import PeftType
from peft.values import NonNegativeFloat, PositiveInt


@dataclass
class AdamssConfig(LayerConfig, peft_type=PeftType.ADAMSS):
    """Adaptive multi-subspace fine-tuning: the rows of W fall into clusters, and each gets a low-rank change.

    With the bias as a last column, [W, b] is about U V with V [r, in + 1] from its singular vectors; the rows of U are
    clustered, and rows of cluster i of [W', b'] are those of [W, b] + B_i A_i V, with A_i [subspace_rank, r] and B_i
    [rows, subspace_rank] trained. V is stored; the clusters are found again in the base weight, which has to be the
    same then, unless `save_clusters` puts them into the file.

    With `use_asa`, fewer and fewer subspaces are trained: those of least importance stay as they are. That needs
    `model.base_model.update_and_allocate(step)` in each training step, after `backward()` and before `zero_grad()`.

    Args:
        r: singular vectors that are kept, at most the smaller side of the weight.
        num_subspaces: clusters of each module's rows.
        subspace_rank: rank of the change of each.
        init_weights: `"orthogonal"` starts with B zero, without effect; None starts B at random.
        use_asa: train fewer subspaces as training goes on.
        asa_target_subspaces: about how many of all modules' subspaces are trained at the end: those of more
            importance than the one that is this far down.
        init_warmup, final_warmup: steps at which that begins and ends.
        mask_interval: steps from one choice to the next.
        asa_importance_beta, asa_uncertainty_beta: decay of the moving averages of importance and of its uncertainty.
        asa_schedule_exponent: how fast the number falls: that of the share of steps that are left.
        use_dynamic_rank: give subspaces less than `subspace_rank` where their singular values say so.
        svd_threshold: for that, how large a singular value has to be, relative to the largest.
        random_seed: seed of the singular vectors and so of the clusters.
        save_clusters: store which rows are in which cluster, for a base model that may be held in another precision
            when the adapter is loaded. Other libraries cannot read such a file.
    """

    r: PositiveInt = 100
    num_subspaces: PositiveInt = 5
    subspace_rank: PositiveInt = 1
    init_weights: Literal["orthogonal"] | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: NonNegativeFloat = 0.1
    random_seed: int = 0
    save_clusters: bool = False

    def check(self) -> None:
        self.init_weights = None if self.init_weights is False else self.init_weights
        if self.init_weights is True:
            raise ValueError("init_weights must be 'orthogonal' or None, got True.")
        if not self.use_asa:
            return
        for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive with use_asa, got {getattr(self, name)}.")
        if self.init_warmup >= self.final_warmup:
            first, last = f"init_warmup={self.init_warmup}", f"final_warmup={self.final_warmup}"
            raise ValueError(f"{first} must be less than {last} with use_asa: subspaces are dropped between them.")


class AdamssLayer(AdapterLayer):
    """A module with changes of clusters of its rows.

    `adamss_A` and `adamss_B` hold lists with a matrix for each cluster; `adamss_rows` [out] has the rows of one cluster
    after the other.
    """

    adamss_A = ModuleSlot[nn.ParameterList]()
    adamss_B = ModuleSlot[nn.ParameterList]()
    adamss_newB = FixedSlot()
    adamss_rows = FixedSlot(stored="save_clusters")

    #: subspaces that are not trained any more
    adamss_dropped = Setting["set[int]"]()
    #: for each trained tensor, the moving averages of its importance and of the uncertainty of that
    adamss_importance = Setting["dict[nn.Parameter, tuple[Tensor, Tensor]]"]()

    def create(self, name: str, config: AdamssConfig) -> None:
        self.adamss_dropped[name], self.adamss_importance[name] = set(), {}
        pairs, rows, self.adamss_newB[name] = subspaces_of(self.with_bias(), config)
        self.adamss_rows[name] = torch.cat(rows)
        if torch.empty(0).is_meta:
            pairs = [(down.to("meta"), up.to("meta")) for down, up in pairs]
        self.adamss_A[name] = nn.ParameterList([down for down, _ in pairs])
        self.adamss_B[name] = nn.ParameterList([up for _, up in pairs])

    def draw(self, name: str, config: AdamssConfig) -> None:
        if name not in self.adamss_newB:  # on a twin without, for minimal files
            self.adamss_newB[name] = subspaces_of(self.with_bias(), config)[2]

    def with_bias(self) -> Tensor:
        """The base weight with the bias as its last column: [out, in + 1]."""
        weight, bias = self.original_matrix(), self.original_bias()
        if bias is not None:
            weight = torch.cat((weight, bias.detach()[:, None].to(weight)), 1)
        return weight.float()

    def change(self, name: str) -> Iterator[Change]:
        a, b = self.adamss_A[name], self.adamss_B[name]
        rights, columns = self.adamss_newB[name].to(a[0].dtype), self.in_features
        down, up = torch.cat(list(a)), spread_rows(list(b), self.adamss_rows[name])
        yield LowRank(down @ rights[:, :columns], up)
        if rights.shape[1] > columns:
            yield Bias(up @ (down @ rights[:, columns]))

    def trainable_parameters(self, name: str) -> list[nn.Parameter]:
        if name not in self.adamss_A:
            return []
        dropped = self.adamss_dropped[name]
        return [one for index, pair in enumerate(self.pairs(name)) if index not in dropped for one in pair]

    def pairs(self, name: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A_i and B_i of each subspace."""
        return list(zip(self.adamss_A[name], self.adamss_B[name], strict=True))

    def fit(self, name: str, path: str, find: Callable[[str], Tensor | None]) -> None:
        found: list[tuple[torch.Size, torch.Size]] = []
        while (a := find(f"adamss_A.{len(found)}")) is not None and (b := find(f"adamss_B.{len(found)}")) is not None:
            found.append((a.shape, b.shape))
        lacks_one = any(find(f"adamss_{slot}.{len(found)}") is not None for slot in "AB")  # said for every method
        if not found or lacks_one or found == [(a.shape, b.shape) for a, b in self.pairs(name)]:
            return
        if find("adamss_rows") is None:
            raise RuntimeError(
                f"The rows of {path!r} fall into other clusters than those of adapter {name!r}: the base weight, or how"
                " it is quantised, is not that which it was trained on. Load it on that, and save it there with"
                " save_clusters=True if it is meant for others."
            )
        for own, container in enumerate((self.adamss_A, self.adamss_B)):
            old = container[name]
            lists = nn.ParameterList([old[0].data.new_empty(shapes[own]) for shapes in found])
            container[name] = lists.requires_grad_(old[0].requires_grad)

    @torch.no_grad()
    def track(self, name: str, config: AdamssConfig) -> None:
        """Takes the gradients of a step into account."""
        kept = self.adamss_importance[name]
        for parameter in self.trainable_parameters(name):
            if parameter.grad is not None:
                means = kept.setdefault(parameter, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
                betas = config.asa_importance_beta, config.asa_uncertainty_beta
                track_sensitivity(*means, parameter, parameter.grad, *betas, before=True)

    def scores(self, name: str) -> dict[int, Tensor]:
        """The importance of those subspaces that have had gradients."""
        kept = self.adamss_importance[name]
        return {
            index: torch.stack([(kept[one][0] * kept[one][1]).mean() for one in pair]).sum()
            for index, pair in enumerate(self.pairs(name))
            if all(one in kept for one in pair)
        }

    def drop(self, name: str, index: int) -> None:
        """Leaves a subspace as it is from now on."""
        self.adamss_dropped[name].add(index)
        for parameter in self.pairs(name)[index]:
            parameter.requires_grad_(False)
            parameter.grad = None

    @classmethod
    def check(cls, config: AdamssConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        if find_spec("sklearn") is None:
            raise ImportError("AdaMSS needs scikit-learn to cluster the rows of a weight: pip install scikit-learn.")


def subspaces_of(weight: Tensor, config: AdamssConfig) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], Tensor]:
    """The start of each A_i and B_i, the rows of each cluster, and V, for a matrix [out, in]."""
    if weight.is_meta:  # there is nothing to be clustered: sizes only, those of clusters of equal size
        left, right = weight.new_empty(len(weight), rank := min(config.r, *weight.shape)), weight[:rank]
        rows = list(torch.arange(len(weight), device="meta").tensor_split(min(config.num_subspaces, len(weight))))
    else:
        left, _, right = leading_parts(weight, config.r, 2, config.random_seed)
        rows = cluster_rows(left, config.num_subspaces)
    threshold = config.svd_threshold if config.use_dynamic_rank and not weight.is_meta else None
    pairs = []
    for index in rows:
        down = cluster_basis(left[index], config.subspace_rank, threshold)
        up = weight.new_zeros(len(index), len(down))
        pairs.append((down, up if config.init_weights else 0.01 * torch.randn_like(up)))
    return pairs, rows, right.contiguous()


class AdamssMethod(Method):
    """Which subspaces of all modules are trained."""

    def update_and_allocate(self, global_step: int) -> None:
        """Drops the subspaces of least importance, for those active adapters that ask for it (`use_asa`).

        To be called in every training step, after `backward()` and before `zero_grad()`.

        Args:
            global_step: number of the step.
        """
        for name in self.tuner.active_adapters:
            config = self.configs.get(name)
            if config is None or not config.use_asa or not config.init_warmup <= global_step <= config.final_warmup:
                continue
            layers = list(layers_of(self.model, AdamssLayer, name).values())
            for layer in layers:
                layer.track(name, config)
            if global_step % config.mask_interval == 0:
                total = sum(len(layer.pairs(name)) for layer in layers)
                schedule = config.init_warmup, config.final_warmup, total, config.asa_target_subspaces
                _drop_least(layers, name, budget_at(global_step, *schedule, config.asa_schedule_exponent))


def _drop_least(layers: list[AdamssLayer], name: str, budget: int) -> None:
    """Keeps on training the subspaces of more importance than the last of the budget, and forgets what it was."""
    found = [(layer, index, score) for layer in layers for index, score in layer.scores(name).items()]
    if len(found) > budget:
        scores = torch.stack([score.detach().float().cpu() for _, _, score in found])
        (kept,) = kept_ranks([scores], budget - 1)
        kept[scores.argmax()] = True
        for (layer, index, _), keep in zip(found, kept.tolist(), strict=True):
            if not keep:
                layer.drop(name, index)
    for layer in layers:
        layer.adamss_importance[name] = {}


class AdamssModel(BaseTuner, layer=AdamssLayer, method=AdamssMethod, prefix="adamss_"):
    """A model with changes of clusters of rows."""
