"""What a LoRA adapter is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from peft.config import LayoutConfig
from peft.errors import warn
from peft.fields import as_settings
from peft.registry import PeftType
from peft.tuners.lora.settings import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.values import dataclass_in, field_types


@dataclass
class LoraConfig(LayoutConfig, peft_type=PeftType.LORA):
    """Low-rank adaptation (arXiv:2106.09685): W' = W + s B A, with A [r, in], B [out, r] and s = lora_alpha / r.

    Args:
        r: rank of the change.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the adapter's input.
        use_rslora: scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).
        init_lora_weights: True starts A at random and B at zero, without effect; `"gaussian"` draws A from a normal
            distribution of deviation 1 / r; False starts both at random, with an effect. `"orthogonal"` makes neither
            zero, but their product. `"pissa"` (or `"pissa_niter_N"`, by a randomised decomposition of N steps),
            `"olora"`, `"corda"` and `"lora_ga"` start with a part of the base weight, which that loses: save with
            `path_initial_model_for_weight_conversion` to have an adapter for the original base. `"loftq"` quantises
            the base weight and makes up for the loss. `"mica"` fixes B to the least singular vectors. `"eva"` waits
            for `initialize_lora_eva_weights`, `"corda"` and `"lora_ga"` need `preprocess_corda` and
            `preprocess_loraga` first.
        rank_pattern: ranks of single modules: name or regular expression for its end -> rank.
        alpha_pattern: the same for lora_alpha.
        trainable_token_indices: rows of the embedding to train as well: a list for the input embedding, or module
            name -> list.
        layer_replication: ranges [start, end) of decoder layers to build the model anew from; repeated layers share
            their weights and have adapters of their own.
        lora_bias: give B a bias.
        ensure_weight_tying: keep what is trained of tied modules (embedding and output layer) the same.
        runtime_config: see [`LoraRuntimeConfig`].
        megatron_config: for Megatron's `ColumnParallelLinear` and `RowParallelLinear` among the targets: the settings
            of its `TransformerConfig`. A and B are shared out among the processes as those are.
        megatron_core: where to import Megatron's layers from.
        loftq_config: settings of the start `"loftq"`, see [`LoftQConfig`].
        eva_config: settings of the start `"eva"`, see [`EvaConfig`].
        corda_config: settings of the start `"corda"`, see [`CordaConfig`].
        lora_ga_config: settings of the start `"lora_ga"`, see [`LoraGAConfig`].
        use_dora: learn the length of each row of the weight beside the change of its direction (DoRA,
            arXiv:2402.09353).
        use_qalora: on layers that GPTQ has quantised, see the input in groups (QA-LoRA, arXiv:2309.14717).
        qalora_group_size: features in such a group.
        alora_invocation_tokens: act from the last occurrence of these tokens on (aLoRA, arXiv:2504.12397).
        arrow_config: choose among other adapters for each token, see [`ArrowConfig`] and `create_arrow_model`.
        use_bdlora: make A or B block-diagonal, see [`BdLoraConfig`].
        velora_config: keep less of the input for the gradient of A, see [`VeloraConfig`].
        kasa_config: replace the least singular parts of the weight, see [`KasaConfig`].
        monteclora_config: perturb A by samples of a learned distribution, see [`MontecloraConfig`].
        init_seed: what a start that is drawn at random and changes the base weights (`"pissa_niter_N"`, `"lora_ga"`) is
            drawn from, so that loading repeats it; drawn itself and stored if None.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | dict | None = None
    corda_config: CordaConfig | dict | None = None
    lora_ga_config: LoraGAConfig | dict | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | dict | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    use_bdlora: BdLoraConfig | dict | None = None
    arrow_config: ArrowConfig | dict | None = None
    kasa_config: KasaConfig | dict | None = None
    ensure_weight_tying: bool = False
    init_seed: int | None = None

    pattern_fields: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    runtime_fields = ("runtime_config",)

    def check(self) -> None:
        own_class: Any = type(self)
        for name, kind in field_types(own_class).items():
            settings = dataclass_in(kind)
            if settings is not None and name != "loftq_config":
                setattr(self, name, as_settings(name, getattr(self, name), settings))
        self.runtime_config = self.runtime_config or LoraRuntimeConfig()
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()  # "OLoRA" is "olora"
        if self.use_dora and self.megatron_config:
            raise ValueError("use_dora=True cannot be combined with megatron_config: it needs the weight as a whole.")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias=True cannot be combined with use_dora=True.")
        if self.lora_bias and self.init_lora_weights not in (True, False):
            raise ValueError(f"lora_bias=True needs init_lora_weights=True or False, got {self.init_lora_weights!r}.")
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise ValueError("init_lora_weights='loftq' needs loftq_config, such as LoftQConfig(loftq_bits=4).")
        if self.init_lora_weights == "loftq":
            as_settings("loftq_config", self.loftq_config, LoftQConfig)  # which checks it; it stays as it is given
        if self.init_lora_weights == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig()
        if self.init_lora_weights == "lora_ga" and self.lora_ga_config is None:
            self.lora_ga_config = LoraGAConfig()
        for setting, start in (("eva_config", "eva"), ("corda_config", "corda"), ("lora_ga_config", "lora_ga")):
            if getattr(self, setting) is not None and self.init_lora_weights != start:
                warn(f"{setting} has no effect without init_lora_weights={start!r}.")
        self._custom_modules: dict[type[nn.Module], type[Any]] = {}

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[Any]]) -> None:
        """Adapter layers for kinds of module that LoRA does not know: module class -> layer class.

        Not saved: has to be called again before loading.
        """
        self._custom_modules.update(mapping)
