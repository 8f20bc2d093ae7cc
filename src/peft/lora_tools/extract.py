"""A LoRA out of what fine-tuning has done to all weights of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft.core.base_op import base_op
from peft.core.plan import make_plan
from peft.core.storage import storage_of
from peft.core.targets import ALL_LINEAR, ROOT, named_targets
from peft.core.walk import with_progress
from peft.errors import listed, warn
from peft.lora_tools.convert import ConvertedLora, LayerChange, check_rank, decompose, report, set_ranks
from peft.ops.principal import unrounded
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.factors import adapter_rank, block_count
from peft.tuners.lora.kinds import LAYERS
from peft.tuners.lora.layer import LoraLayer


@torch.no_grad()
def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | float,
    *,
    target_modules: Sequence[str] | str = ALL_LINEAR,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
    progressbar: bool = False,
) -> ConvertedLora:
    """The LoRA that comes nearest to turning one model into another, fine-tuned one.

    Each layer's difference is cut down to the rank by a truncated singular value decomposition. The LoRA's scale is
    one.

    Args:
        base, tuned: models of the same structure; neither is changed.
        rank: the LoRA's rank. A float is a threshold, above 0 and up to 1: each layer gets the smallest rank
            that keeps that share of the squared singular values.
        target_modules: which layers, as in a LoraConfig.
        modules_to_save: modules to take over whole.
        task_type: as in a LoraConfig.
        progressbar: show one.

    Returns:
        The pair (LoraConfig, state dict), with an attribute `errors`: the relative error of each module. A warning
        names what has changed in neither a target nor a saved module.

    Raises:
        ValueError: the models differ in structure, nothing matches, or the rank is too low or too high.
    """
    check_rank(rank)
    groups = (module.groups for module in base.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    config = LoraConfig(
        r=rank if isinstance(rank, int) else math.lcm(*groups),  # which groups can share, until layers have their own
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        task_type=task_type,
    )
    _check_structure(base, tuned)
    config.target_modules = named_targets(config, base)
    plan = make_plan(base, config, LoraLayer)
    config.base_model_name_or_path = base.__dict__.get("name_or_path")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    for target in with_progress(plan.targets, progressbar, "Extracting"):
        change = _difference(target.module, tuned.get_submodule(target.key))
        block = change.block(rank)
        if block > change.s.shape[1]:
            raise ValueError(f"rank={rank} is larger than the weight of {target.key!r} allows ({change.s.shape[1]}).")
        ranks[target.key] = adapter_rank(change.layer, block)
        tensors.update({f"{ROOT}{target.key}.{name}": t for name, t in change.tensors(block).items()})
        errors[target.key] = change.error(block)
    whole = {f"{key}.{name}": v for key in plan.save for name, v in tuned.get_submodule(key).state_dict().items()}
    tensors |= {f"{ROOT}{name}": value.clone() for name, value in whole.items()}
    set_ranks(config, ranks, rank)
    report(errors)
    _report_rest(base, tuned, {f"{target.key}.{target.op.weight_name}" for target in plan.targets}.union(whole))
    return ConvertedLora(config, tensors, errors)


def _difference(before: nn.Module, after: nn.Module) -> LayerChange:
    op = base_op(before)
    assert op is not None
    layer = LAYERS[op.kind](before, op=op)
    weights = (op.matrix(storage_of(module, op.weight_name).read(module, op.weight_name)) for module in (after, before))
    tuned, base = map(unrounded, weights)
    blocks = (tuned - base).unflatten(0, (block_count(layer), -1))
    return LayerChange(layer, *decompose(blocks), None)


def _check_structure(base: nn.Module, tuned: nn.Module) -> None:
    """Raises ValueError where two models do not have the same parameters."""
    ours, theirs = ({name: p.shape for name, p in model.named_parameters()} for model in (base, tuned))
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if different:
        raise ValueError(f"The two models differ in structure, or in the shape of parameters: {listed(different, 4)}.")


def _report_rest(base: nn.Module, tuned: nn.Module, covered: set[str]) -> None:
    """Warns of what has changed and is not in the LoRA."""
    left = {name: value for name, value in base.named_parameters() if name not in covered}
    rest = [name for name, value in left.items() if not torch.equal(value, tuned.get_parameter(name).to(value))]
    if rest:
        warn(f"The LoRA leaves out {len(rest)} parameters that differ too: {listed(rest, 3)}. Add them to its targets.")
