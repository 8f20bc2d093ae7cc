"""How the factors A and B of an adapter start, beyond drawing them at random.

A start says what A and B of one adapter are. Some take the part of the base weight that A and B begin with out of it,
so that the model as a whole is unchanged: what is left of the weight is noted, and written when the adapter is
complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import BaseOp
from peft.core.storage import onloaded, storage_of
from peft.errors import warn
from peft.fields import as_settings
from peft.ops.principal import randomised_svd, seeded, truncated_svd
from peft.ops.quantise import int8_rounded, nf4_rounded
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.factors import in_two
from peft.tuners.lora.settings import LoftQConfig, LoraGAConfig

#: where `preprocess` leaves what it found on a base module
CORDA, GRADIENT = "eigens", "_peft_loraga_grad"


@dataclass(frozen=True)
class Start:
    """One way to start.

    Attributes:
        factors: A [r, in] and B [out, r] of an adapter on a layer; None for those that it would have by default.
        kinds: kinds of base module it works on.
        plain_on: other kinds, where it means the plain start (as in huggingface/peft).
        changes_base: whether it changes the base weight.
        takes_product: whether it takes scaling B A out of it, and no more.
        trains_b: whether B is trained.
        check: raises ValueError where it cannot be made: (configuration, module's name, module, rank).
    """

    factors: Callable[[FactorLayer, str, LoraConfig], tuple[Tensor, Tensor] | None]
    kinds: frozenset[str] = frozenset(("Linear", "Conv1D"))
    plain_on: frozenset[str] = frozenset(("Embedding",))
    changes_base: bool = False
    takes_product: bool = False
    trains_b: bool = True
    check: Callable[[LoraConfig, str, nn.Module, int], None] = lambda config, name, module, r: None

    def fill(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        """Gives A and B of an adapter their values, and notes what is to be left of the base weight."""
        factors = self.factors(layer, name, config)
        if factors is None:
            layer.reset_lora_parameters(name)
            return
        fill_factors(layer, name, *factors)
        if self.takes_product:
            layer.lora_residual[name] = partial(_without_product, layer, name)


def to_compute(tensor: Tensor, config: Any) -> Tensor:
    """`tensor` in float32 where a decomposition of it is made: on the accelerator, if it may go there for that."""
    device = tensor.device
    if config.runtime_config.ephemeral_gpu_offload and device.type == "cpu":
        accelerators = getattr(torch, "accelerator", None)  # from torch 2.6 on
        if accelerators is not None and accelerators.is_available():
            device = accelerators.current_accelerator()
    return tensor.to(device=device, dtype=torch.promote_types(tensor.dtype, torch.float32))


def base_matrix(layer: FactorLayer, config: LoraConfig) -> Tensor:
    """The base weight [out, in], ready for a decomposition."""
    with onloaded(layer.get_base_layer()):
        return to_compute(layer.op.matrix(layer.get_base_weight()).detach(), config)


def fill_factors(layer: FactorLayer, name: str, a: Tensor, b: Tensor) -> None:
    """Copies A [r, in] and B [out, r] into an adapter."""
    for factor, values in zip(layer.factors(name), (a, b), strict=True):
        with torch.no_grad():
            factor.copy_(values.reshape(factor.shape))


def _without_product(layer: FactorLayer, name: str, weight: Tensor) -> Tensor:
    """W - s B A."""
    change = layer.low_rank(name).delta().to(weight.device)
    return (weight.to(change.dtype) - change).to(weight.dtype)


def settle_seed(config: LoraConfig) -> None:
    """Sees to it that a start which is drawn at random, and changes the base weights, is the same again on loading."""
    start = str(config.init_lora_weights)
    if config.init_seed is not None or not (start.startswith("pissa_niter") or start == "lora_ga"):
        return
    if not hasattr(config, "_said_by"):
        # Where the seed has just been set, it says it all, and draws are what they would be without this.
        config.init_seed = torch.initial_seed() if _is_fresh() else int(torch.randint(2**31, ()))
    else:
        warn(
            f"The file does not say what init_lora_weights={start!r} was drawn from (init_seed), and the adapter needs"
            " the base weights that this start left: they are drawn anew, and outputs are off by the difference. Where"
            " the adapter was trained, save it with path_initial_model_for_weight_conversion."
        )


def _is_fresh() -> bool:
    """Whether nothing has been drawn since the seed was set."""
    return torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(torch.initial_seed()).get_state())


@contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """While it lasts, random numbers begin at `seed`, if there is one; then they go on as if nothing had been."""
    if seed is None or (seed == torch.initial_seed() and _is_fresh()):
        yield
        return
    with seeded(torch.device("cpu"), seed):
        yield


def _pissa(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """The r largest singular values of W and their vectors (arXiv:2404.02948)."""
    weight, r = base_matrix(layer, config), layer.r[name]
    steps = re.search(r"\d+$", str(config.init_lora_weights))
    parts = truncated_svd(weight, r) if steps is None else randomised_svd(weight, r, int(steps[0]))
    return in_two(*parts, layer.scaling[name])


def _olora(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """The first r columns of Q and rows of R of W = Q R (arXiv:2406.01775)."""
    q, r = torch.linalg.qr(base_matrix(layer, config))
    return r[: layer.r[name]], q[:, : layer.r[name]]


def _orthogonal(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A and B of random directions in two halves of an orthonormal basis, so that B A is zero though neither is."""
    r = layer.r[name]
    basis, _ = torch.linalg.qr(torch.randn(r, r))
    a = torch.randn(layer.in_features, r // 2) @ basis[::2] / 10
    return a.T, torch.randn(r // 2, layer.out_features).T @ basis[1::2] / 10


def _mica(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """B the left singular vectors of the r smallest singular values of W, A zero (arXiv:2604.01694)."""
    u, _, _ = torch.linalg.svd(base_matrix(layer, config), full_matrices=False)
    return torch.zeros_like(layer.factors(name)[0]), u[:, -layer.r[name] :]


def _zero(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """A at random as it was made, B zero."""
    a, b = layer.factors(name)
    return a, torch.zeros_like(b)


def _corda(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """Singular values and vectors of W C, C the covariance of the inputs, with C taken out again (arXiv:2406.05223)."""
    found = layer.get_base_layer().__dict__[CORDA]
    return in_two(found.U_WC, found.S_WC, found.V_WC.T, layer.scaling[name])


def _lora_ga(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor] | None:
    """Singular vectors of the gradient of W (arXiv:2407.05000)."""
    setting: LoraGAConfig = config.lora_ga_config or LoraGAConfig()  # type: ignore[assignment]
    gradient, r, scaling = layer.get_base_layer().__dict__.get(GRADIENT), layer.r[name], layer.scaling[name]
    if gradient is None:
        return None
    gradient = to_compute(layer.op.matrix(gradient), config)
    u, s, vh = randomised_svd(gradient, min(4 * r, *gradient.shape), 4)
    of_a, of_b = {
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "A2rBr": (slice(r, 2 * r), slice(0, r)),
        "ArB2r": (slice(0, r), slice(r, 2 * r)),
    }.get(setting.direction) or [torch.randperm(min(2 * r, len(s)))[:r].to(s.device)] * 2
    a, b, lengths = vh[of_a], u[:, of_b] * s[of_b], s[of_b]
    if setting.scale == "stable":
        b = b * (layer.out_features**0.25 / setting.stable_gamma**0.5)
    elif setting.scale == "weight_svd" and lengths[0] > 0:
        largest = randomised_svd(base_matrix(layer, config), r, 4)[1][0]
        b = b * (largest / lengths[0])
    elif setting.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a, b


def _loftq(layer: FactorLayer, name: str, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """B A the nearest of rank r to what quantising W loses, by turns with quantising W - B A (arXiv:2310.08659)."""
    setting = as_settings("loftq_config", config.loftq_config, LoftQConfig)
    weight, r = base_matrix(layer, config), layer.r[name]
    quantise = nf4_rounded if setting.loftq_bits == 4 else int8_rounded
    change = torch.zeros_like(weight)
    for _ in range(setting.loftq_iter):
        before = change
        u, s, vh = truncated_svd(weight - quantise(weight - before), r)
        change = (u * s) @ vh
    layer.lora_residual[name] = lambda base: quantise(base.float() - before.to(base.device)).to(base.dtype)
    return in_two(u, s, vh, layer.scaling[name])


def _check_even(config: LoraConfig, name: str, module: nn.Module, r: int) -> None:
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got r={r} for {name!r}.")


def _check_corda(config: LoraConfig, name: str, module: nn.Module, r: int) -> None:
    found = module.__dict__.get(CORDA)
    if found is None:
        raise ValueError(
            f"init_lora_weights='corda' needs preprocess_corda(model, config, run_model) first, and {name!r} was not"
            " part of it. To load an adapter that was started so, give it the file of the decompositions (cache_file)."
        )
    if len(found.S_WC) != r:
        raise ValueError(f"preprocess_corda found rank {len(found.S_WC)} for {name!r}, but r={r} is asked for now.")


def _check_lora_ga(config: LoraConfig, name: str, module: nn.Module, r: int) -> None:
    if GRADIENT not in module.__dict__:
        warn(
            "init_lora_weights='lora_ga' without preprocess_loraga(model, config, train_step): A and B start as they do"
            " by default, and the base weights stay as they are. An adapter that was saved without"
            " path_initial_model_for_weight_conversion needs the base weights that it was trained with."
        )


STARTS: dict[str, Start] = {
    "pissa": Start(_pissa, changes_base=True, takes_product=True),
    "olora": Start(_olora, changes_base=True, takes_product=True),
    "orthogonal": Start(_orthogonal, frozenset(("Linear", "Conv1D", "Parameter")), check=_check_even),
    "mica": Start(_mica, frozenset(("Linear", "Conv1D", "Embedding")), trains_b=False),
    "corda": Start(_corda, changes_base=True, takes_product=True, check=_check_corda),
    "lora_ga": Start(
        _lora_ga,
        plain_on=frozenset(("Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention")),
        changes_base=True,
        takes_product=True,
        check=_check_lora_ga,
    ),
    "loftq": Start(_loftq, frozenset(("Linear", "Conv1D", "Embedding")), changes_base=True),
    # until `initialize_lora_eva_weights` gives A its values
    "eva": Start(_zero, frozenset(("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding"))),
}
#: what `FactorLayer.reset_lora_parameters` does on its own
_PLAIN = (True, False, "gaussian")


def start_of(init_lora_weights: bool | str, kind: str = "Linear") -> Start | None:
    """The start that a configuration asks for on a kind of module; None for the plain random ones.

    Raises:
        ValueError: there is none of that name.
    """
    if init_lora_weights in _PLAIN:
        return None
    name = re.sub(r"^pissa_niter_\d+$", "pissa", str(init_lora_weights))
    if name not in STARTS:
        known = ", ".join(map(repr, (*_PLAIN, *STARTS, "pissa_niter_4")))
        raise ValueError(f"Unknown init_lora_weights={init_lora_weights!r}; there are {known}.")
    start = STARTS[name]
    return None if kind in start.plain_on - start.kinds else start


def check_start(config: LoraConfig, name: str, module: nn.Module, op: BaseOp, r: int) -> None:
    """Raises ValueError where the start cannot be made on a module."""
    start = start_of(config.init_lora_weights, op.kind)
    if start is None:
        return
    asked, most = f"init_lora_weights={config.init_lora_weights!r}", min(op.out_features, op.in_features)
    if op.kind not in start.kinds or getattr(op, "num_experts", 1) > 1:
        known = ", ".join(sorted(start.kinds))
        raise ValueError(f"{asked} does not work on {name!r}, a {op.kind}; it works on {known}.")
    if r > most and start.factors not in (_zero, _orthogonal):
        raise ValueError(f"{asked} needs a rank of at most {most} on {name!r}, got r={r}.")
    start.check(config, name, module, r)
    if start.changes_base:
        storage_of(module, op.weight_name).check_write(module, op.weight_name)
