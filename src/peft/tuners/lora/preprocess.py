"""What the starts CorDA and LoRA-GA have to see of the data before the adapter is made."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import LinearOp, TransposedOp, base_op
from peft.core.plan import make_plan
from peft.core.storage import storage_of
from peft.core.targets import named_targets
from peft.core.walk import with_progress
from peft.pickles import read_pickle
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.settings import CordaConfig, LoraGAConfig
from peft.tuners.lora.starts import CORDA, GRADIENT
from peft.untrusted import check_allowed


def targeted(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The linear layers that an adapter would go on, by name.

    Raises:
        ValueError: there are none.
    """
    plain: Any = copy.copy(config)
    plain.init_lora_weights = True
    plain.target_modules = named_targets(plain, model)
    plan = make_plan(model, plain, LoraLayer)
    found = {t.key: t.module for t in plan.targets if isinstance(base_op(t.module), (LinearOp, TransposedOp))}
    if not found:
        raise ValueError(f"target_modules={plain.target_modules} matches no linear layer of {type(model).__name__}.")
    return found


@dataclass
class CordaEigens:
    """The decomposition of W C of one layer, cut down to the adapter's rank.

    Attributes:
        S_WC: singular values [r].
        U_WC: left singular vectors [out, r].
        V_WC: right ones with C taken out again, C^-1 V [in, r].
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Finds out what the start CorDA needs (arXiv:2406.05223), for `get_peft_model` with the same model next.

    Args:
        model: the base model.
        lora_config: the configuration, with `corda_config`.
        run_model: runs the model over sample data; not needed where a file of an earlier run is given and there.
        hooked_model: the model that `run_model` runs, if it is another than `model`.

    Raises:
        ValueError: there is neither a file nor `run_model`, or inputs were not finite.
    """
    setting: CordaConfig = lora_config.corda_config or CordaConfig()  # type: ignore[assignment]
    layers = targeted(model, lora_config)
    if setting.cache_file or setting.covariance_file:
        check_allowed(lora_config, "corda_config")

    def covariances() -> dict[str, Tensor]:
        if run_model is None:
            raise ValueError("run_model is needed, unless corda_config names a file of an earlier run that exists.")
        seen = layers if hooked_model is None else targeted(hooked_model, lora_config)
        found = _covariances(seen, run_model, setting.use_float16_for_covariance)
        missing = [name for name in layers if name not in found]
        if missing:
            raise ValueError(f"run_model did not reach {', '.join(missing[:4])}.")
        return found

    def decompositions() -> dict[str, Tensor]:
        known, found = _kept(setting.covariance_file, covariances), dict[str, Tensor]()
        for name, layer in with_progress(list(layers.items()), setting.verbose, "CorDA"):
            eigens = _decomposed(layer, known[name], lora_config.at(name).r, setting.corda_method)
            found |= {f"{name}.eigens.{key}": value for key, value in vars(eigens).items()}
            if not setting.prune_temporary_fields:
                layer.covariance_matrix = known[name]
        return found

    kept = _kept(setting.cache_file, decompositions)
    for name, layer in layers.items():
        values = (kept[f"{name}.eigens.{key}"] for key in CordaEigens.__dataclass_fields__)
        layer.__dict__[CORDA] = CordaEigens(*values)


def _covariances(layers: dict[str, nn.Module], run_model: Callable[[], Any], in_half: bool) -> dict[str, Tensor]:
    """The mean of X^T X over the calls of each layer, its inputs X scaled to at most 1: [in, in] by name."""
    sums: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        x = x if in_half else x.float()
        covariance = (x := x / x.max().abs()).T @ x
        if not covariance.isfinite().all():
            raise ValueError(f"The inputs of {name!r} are not finite, or all zero.")
        calls[name] += 1
        sums[name] = sums[name] + covariance if name in sums else covariance

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs)))
        run_model()
    return {name: total / calls[name] for name, total in sums.items()}


def _decomposed(layer: Any, covariance: Tensor, r: int, method: str) -> CordaEigens:
    op = base_op(layer)
    assert op is not None
    weight = op.matrix(layer.weight).float()
    c = covariance.float()
    damping = torch.eye(len(c), device=c.device) * c.diag().mean() * 0.01
    while torch.linalg.cholesky_ex(c + damping).info > 0:
        damping = 2 * damping
    c = c + damping
    u, s, vh = torch.linalg.svd(weight @ c, full_matrices=False)
    part = slice(None, r) if method == "ipm" else slice(len(s) - r, None)
    v = torch.linalg.solve(c, vh[part].T)
    return CordaEigens(s[part].clone(), u[:, part].clone(), v)


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Finds out what the start LoRA-GA needs (arXiv:2407.05000), for `get_peft_model` with the same model next.

    Args:
        model: the base model, not quantised.
        lora_config: the configuration, with `lora_ga_config`.
        train_step: runs the model and `backward()` over sample data, once or several times.
        cache_file: where the gradients are kept, to be found there the next time.

    Raises:
        ValueError: the configuration has no `lora_ga_config`, a layer is quantised, or `train_step` did not reach it.
    """
    if not isinstance(lora_config.lora_ga_config, LoraGAConfig):
        raise ValueError("LoRA-GA needs init_lora_weights='lora_ga' and lora_ga_config=LoraGAConfig(...).")
    layers = targeted(model, lora_config)
    quantised = [name for name, layer in layers.items() if storage_of(layer, "weight").backend is not None]
    if quantised:
        raise ValueError(f"LoRA-GA needs gradients of the weights, which {quantised[0]!r}, quantised, has not.")
    kept = _kept(cache_file, lambda: _gradients(model, layers, train_step))
    for name, layer in layers.items():
        layer.__dict__[GRADIENT] = kept[f"{name}.{GRADIENT}"]


def _gradients(model: nn.Module, layers: dict[str, Any], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """The mean gradient of each layer's weight over the backward passes, by the names that files have for them."""
    passes: Counter[str] = Counter()
    state = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    training = model.training
    model.train()
    for parameter, _, _ in state:
        parameter.requires_grad_(False)
        parameter.grad = None
    weights: dict[str, Any] = {name: layer.weight.requires_grad_(True) for name, layer in layers.items()}
    try:
        with torch.enable_grad(), ExitStack() as hooks:
            for name, weight in weights.items():
                count = partial(passes.update, [name])
                hooks.enter_context(weight.register_post_accumulate_grad_hook(lambda _, count=count: count()))
            train_step()
        missing = [name for name, weight in weights.items() if weight.grad is None]
        if missing:
            raise ValueError(f"train_step gave no gradient to {', '.join(missing[:4])}; it has to call backward().")
        return {f"{name}.{GRADIENT}": weight.grad / passes[name] for name, weight in weights.items()}
    finally:
        for parameter, requires_grad, grad in state:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        model.train(training)


def _kept(path: str | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file; if there is none, or it is empty, what `make` makes, which is then kept there."""
    if path is not None and os.path.exists(path) and os.path.getsize(path):
        return read_pickle(path)
    tensors = make()
    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        torch.save(tensors, path)
    return tensors
