"""Settings of LoRA's variants and starts, which are fields of `LoraConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args


def _need(ok: bool, name: str, value: Any, what: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {what}, got {value!r}.")


@dataclass
class LoraRuntimeConfig:
    """Settings that only matter in the running process; never saved.

    Args:
        ephemeral_gpu_offload: move tensors to the accelerator for heavy parts of an initialisation only.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """Settings of the LoftQ start (arXiv:2310.08659).

    Args:
        loftq_bits: bits of the quantisation.
        loftq_iter: alternating steps.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """Settings of the EVA start (arXiv:2410.07170).

    Args:
        rho: a layer may get up to r * rho ranks; at least 1, which shares out nothing.
        tau: cosine similarity of a component to what it was a batch before, from which on it counts as found; 0 to 1.
        use_label_mask: leave out positions that the labels mask.
        label_mask_value: the label that masks.
        whiten: divide the components by their singular values.
        adjust_scaling_factors: keep the size of gradients the same where ranks have changed.

    Raises:
        ValueError: a value is out of range.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        _need(self.rho >= 1, "rho", self.rho, "at least 1")
        _need(0 <= self.tau <= 1, "tau", self.tau, "between 0 and 1")


@dataclass
class CordaConfig:
    """Settings of the CorDA start (arXiv:2406.05223).

    Args:
        cache_file: where the decompositions are kept, to be found there the next time.
        covariance_file: where the covariances are kept.
        corda_method: `"ipm"` starts with the directions that matter most on the given data, `"kpm"` with those that
            matter least, so that what the data shows is preserved.
        verbose: print progress.
        use_float16_for_covariance: add up covariances in half precision.
        prune_temporary_fields: forget the covariances when the decompositions are made.

    Raises:
        ValueError: an unknown method.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        _need(self.corda_method in ("ipm", "kpm"), "corda_method", self.corda_method, "'ipm' or 'kpm'")


Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
GradientScale = Literal["stable", "weight_svd", "gd_scale", "unit"]


@dataclass
class LoraGAConfig:
    """Settings of the LoRA-GA start (arXiv:2407.05000).

    Args:
        direction: which singular vectors of the gradient A and B take.
        scale: how long A and B are.
        stable_gamma: gamma of the scale `"stable"`.

    Raises:
        ValueError: an unknown direction or scale.
    """

    direction: Direction = "ArB2r"
    scale: GradientScale = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        for name, known in (("direction", get_args(Direction)), ("scale", get_args(GradientScale))):
            _need(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")


@dataclass
class VeloraConfig:
    """Settings of VeLoRA (arXiv:2405.17991).

    Args:
        num_groups: groups that the features of the input are divided into.
        scale: factor on the inputs when they are rebuilt.
        init_type: where the direction that the groups are projected on comes from: the mean of each batch
            (`"batch_average"`), of the first (`"batch_average_once"`), or chance (`"random"`).

    Raises:
        ValueError: a value is out of range.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        _need(self.num_groups > 0, "num_groups", self.num_groups, "positive")
        _need(self.scale > 0, "scale", self.scale, "positive")
        known = ("batch_average", "batch_average_once", "random")
        _need(self.init_type in known, "init_type", self.init_type, f"one of {', '.join(known)}")


@dataclass
class MontecloraConfig:
    """Settings of MonteCLoRA (arXiv:2411.04358).

    Args:
        num_samples: samples that a perturbation is the average of.
        use_entropy: add the sum of the squared weights of the samples to the loss.
        dirichlet_prior: concentration of the prior over those weights.
        sample_scaler: size of the perturbation.
        kl_loss_weight: weight of the divergence from the priors in the loss.
        buffer_size: taken for compatibility: samples are drawn when they are needed, not in advance.

    Raises:
        ValueError: a value is out of range.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        _need(self.num_samples > 0, "num_samples", self.num_samples, "positive")
        _need(self.dirichlet_prior > 0, "dirichlet_prior", self.dirichlet_prior, "positive")
        _need(self.buffer_size > 0, "buffer_size", self.buffer_size, "positive")
        for name in ("sample_scaler", "kl_loss_weight"):
            _need(getattr(self, name) >= 0, name, getattr(self, name), "non-negative")


@dataclass
class ArrowConfig:
    """Settings of Arrow routing over several adapters (arXiv:2405.11157).

    Args:
        top_k: experts that a token uses.
        router_temperature: temperature of the softmax over them.
        use_gks: take the mean of the general adapters out of the experts first (GenKnowSub, arXiv:2505.10939).
        task_adapter_names, gks_adapter_names: the experts and the general adapters; `create_arrow_model` sets them.
        rng_seed: seed of the power iteration that finds an expert's direction.

    Raises:
        ValueError: a value is out of range.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        _need(self.top_k > 0, "top_k", self.top_k, "positive")
        _need(self.router_temperature > 0, "router_temperature", self.router_temperature, "positive")


@dataclass
class BdLoraConfig:
    """Settings of BD-LoRA, block-diagonal factors that serve tensor parallelism without communication.

    Args:
        target_modules_bd_a: parts of the names of modules whose A is block-diagonal.
        target_modules_bd_b: parts of the names of modules whose B is.
        nblocks: number of blocks.
        match_strict: every module must be named in one of the two.

    Raises:
        ValueError: the two overlap, or there is no block.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        _need(self.nblocks > 0, "nblocks", self.nblocks, "positive")
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(
                f"target_modules_bd_a and target_modules_bd_b overlap in {', '.join(sorted(both))}: one of a module's"
                " factors can be block-diagonal, not both."
            )


@dataclass
class KasaConfig:
    """Settings of KaSA (arXiv:2412.06071); the penalties are in `LoraModel.kasa_loss`, to be added to the loss.

    Args:
        beta: weight of the squares of the singular values.
        gamma: weight of the factors' distance from orthogonal ones.

    Raises:
        ValueError: a weight is negative.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            _need(getattr(self, name) >= 0, name, getattr(self, name), "non-negative")
