"""Settings of LoRA's variants and starts, which are fields of `LoraConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from peft.fields import Settings
from peft.values import NonNegativeFloat, PositiveFloat, PositiveInt, Range, Share


@dataclass
class LoraRuntimeConfig(Settings):
    """Settings that only matter in the running process; never saved.

    Args:
        ephemeral_gpu_offload: move tensors to the accelerator for heavy parts of an initialisation only.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig(Settings):
    """Settings of the LoftQ start (arXiv:2310.08659).

    Args:
        loftq_bits: bits of the quantisation.
        loftq_iter: alternating steps.
    """

    loftq_bits: Annotated[int, Range("must be 4 bits (NF4) or 8", lambda bits: bits in (4, 8))] = 4
    loftq_iter: PositiveInt = 1


@dataclass
class EvaConfig(Settings):
    """Settings of the EVA start (arXiv:2410.07170).

    Args:
        rho: a layer may get up to r * rho ranks; at least 1, which shares out nothing.
        tau: cosine similarity of a component to what it was a batch before, from which on it counts as found; 0 to 1.
        use_label_mask: leave out positions that the labels mask.
        label_mask_value: the label that masks.
        whiten: divide the components by their singular values.
        adjust_scaling_factors: keep the size of gradients the same where ranks have changed.
    """

    rho: Annotated[float, Range("must be at least 1", lambda number: number >= 1)] = 2.0
    tau: Share = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass
class CordaConfig(Settings):
    """Settings of the CorDA start (arXiv:2406.05223).

    Args:
        cache_file: where the decompositions are kept, to be found there the next time.
        covariance_file: where the covariances are kept.
        corda_method: `"ipm"` starts with the directions that matter most on the given data, `"kpm"` with those that
            matter least, so that what the data shows is preserved.
        verbose: print progress.
        use_float16_for_covariance: add up covariances in half precision.
        prune_temporary_fields: forget the covariances when the decompositions are made.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig(Settings):
    """Settings of the LoRA-GA start (arXiv:2407.05000).

    Args:
        direction: which singular vectors of the gradient A and B take.
        scale: how long A and B are.
        stable_gamma: gamma of the scale `"stable"`.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class VeloraConfig(Settings):
    """Settings of VeLoRA (arXiv:2405.17991).

    Args:
        num_groups: groups that the features of the input are divided into.
        scale: factor on the inputs when they are rebuilt.
        init_type: where the direction that the groups are projected on comes from: the mean of each batch
            (`"batch_average"`), of the first (`"batch_average_once"`), or chance (`"random"`).
    """

    num_groups: PositiveInt = 64
    scale: PositiveFloat = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"


@dataclass
class MontecloraConfig(Settings):
    """Settings of MonteCLoRA (arXiv:2411.04358).

    Args:
        num_samples: samples that a perturbation is the average of.
        use_entropy: add the sum of the squared weights of the samples to the loss.
        dirichlet_prior: concentration of the prior over those weights.
        sample_scaler: size of the perturbation.
        kl_loss_weight: weight of the divergence from the priors in the loss.
        buffer_size: taken for compatibility: samples are drawn when they are needed, not in advance.
    """

    num_samples: PositiveInt = 8
    use_entropy: bool = False
    dirichlet_prior: PositiveFloat = 0.1
    sample_scaler: NonNegativeFloat = 1e-4
    kl_loss_weight: NonNegativeFloat = 1e-5
    buffer_size: PositiveInt = 150


@dataclass
class ArrowConfig(Settings):
    """Settings of Arrow routing over several adapters (arXiv:2405.11157).

    Args:
        top_k: experts that a token uses.
        router_temperature: temperature of the softmax over them.
        use_gks: take the mean of the general adapters out of the experts first (GenKnowSub, arXiv:2505.10939).
        task_adapter_names, gks_adapter_names: the experts and the general adapters; `create_arrow_model` sets them.
        rng_seed: find an expert's direction nearly, by a power iteration with this seed; None finds it exactly.
    """

    top_k: PositiveInt = 3
    router_temperature: PositiveFloat = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None


@dataclass
class BdLoraConfig(Settings):
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
    nblocks: PositiveInt = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"target_modules_bd_a and target_modules_bd_b overlap in {', '.join(sorted(both))}.")


@dataclass
class KasaConfig(Settings):
    """Settings of KaSA (arXiv:2412.06071); the penalties are in `LoraModel.kasa_loss`, to be added to the loss.

    Args:
        beta: weight of the squares of the singular values.
        gamma: weight of the factors' distance from orthogonal ones.
    """

    beta: NonNegativeFloat = 1e-4
    gamma: NonNegativeFloat = 1e-3
