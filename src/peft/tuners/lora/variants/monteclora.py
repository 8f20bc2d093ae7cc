"""MonteCLoRA: A is a distribution, of which training draws samples."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from peft.core.change import LowRank
from peft.core.slots import ModuleSlot, Slot
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.variants.base import Variant

#: least variance and least concentration
_SMALLEST_VARIANCE, _SMALLEST_WEIGHT = 1e-3, 1e-6


class Perturbation(nn.Module):
    """What is drawn for one adapter: noise for A, the weighted mean of n samples.

    Args:
        r: rank of the adapter.
        setting: a [`MontecloraConfig`].
    """

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, r: int, setting: Any):
        super().__init__()
        self.setting = setting
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(setting.num_samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.full((setting.num_samples,), 1 / setting.num_samples))
        #: variances and weights of the last draw, as autograd knows them
        self._drawn: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": None}

    def draw(self, in_features: int) -> Tensor:
        """Noise for A: [r, in].

        Each of n samples is normal, with variances that follow a Wishart distribution; their weights follow a Dirichlet
        distribution, in the normal approximation of its logarithm. A mean of independent samples with weights w is a
        single one, times the length of w.
        """
        variances, weights = self._variances(), self._weights()
        self._drawn = variances, weights
        with torch.no_grad():
            self.gaussian_var_prior.copy_(torch.diag(variances))
            self.expert_weights.copy_(weights)
        noise = torch.randn(len(variances), in_features, device=variances.device, dtype=variances.dtype)
        return self.setting.sample_scaler * weights.norm() * variances.sqrt()[:, None] * noise

    def _variances(self) -> Tensor:
        # The diagonal of a Wishart matrix with r degrees of freedom and unit scale: chi-squared numbers.
        r = len(self.std_prior)
        chi2 = 2 * torch._standard_gamma(torch.full((r,), r / 2, device=self.std_prior.device))
        return ((2 * self.std_prior).exp() * chi2.to(self.std_prior.dtype)).clamp(min=_SMALLEST_VARIANCE)

    def _weights(self) -> Tensor:
        alpha = self.expert_weights_prior.exp().clamp(min=_SMALLEST_WEIGHT)
        n = len(alpha)
        mean = alpha.log() - alpha.log().mean()
        variance = ((1 - 2 / n) / alpha + (1 / alpha).sum() / n**2).clamp(min=_SMALLEST_WEIGHT)
        return torch.softmax(mean + variance.sqrt() * torch.randn_like(alpha), dim=0)

    def penalty(self) -> Tensor:
        """How far the distributions are from their priors, and the weights from equal ones: a number."""
        r, n = len(self.std_prior), len(self.expert_weights_prior)
        variances, weights = self._drawn or (self.gaussian_var_prior.diag(), self.expert_weights)
        log_scale = 2 * self.std_prior
        wishart = r * (log_scale.exp() - log_scale - 1).sum() / 2
        normal = n * (variances - variances.log() - 1).sum() / 2
        alpha = self.expert_weights_prior.exp()
        prior = torch.full_like(alpha, self.setting.dirichlet_prior)
        divergence = kl_divergence(Dirichlet(alpha), Dirichlet(prior))
        loss = self.setting.kl_loss_weight * (divergence + wishart + normal)
        return loss + weights.square().sum() if self.setting.use_entropy else loss


class Monteclora(Variant):
    """LoRA whose A is perturbed by samples of a learned distribution in training (arXiv:2411.04358).

    In evaluation, and merged, it is a plain LoRA. `LoraModel.monteclora_loss` is to be added to the loss;
    `MontecloraTrainerMixin` does so.
    """

    label = "MonteCLoRA (monteclora_config)"
    slots: ClassVar[dict[str, Slot]] = {"lora_monteclora_sampler": ModuleSlot[Perturbation]()}

    def create(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        layer.lora_monteclora_sampler[name] = Perturbation(layer.r[name], self.setting)

    def change(self, layer: FactorLayer, name: str) -> LowRank:
        change = layer.low_rank(name)
        if layer.training:
            noise = layer.lora_monteclora_sampler[name].draw(layer.in_features)
            change.down, change.low, change.high = change.down + noise.to(change.down.dtype), None, None
        return change

    def penalty(self, layer: FactorLayer, name: str) -> Tensor | float:
        return layer.lora_monteclora_sampler[name].penalty() if layer.training else 0.0
