"""Small tools around a model with adapters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, wraps
from statistics import fmean
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import read_config_file
from peft.core.layer import AdapterLayer
from peft.core.storage import storage_of
from peft.core.targets import base_of, model_modules
from peft.core.undo import replaced
from peft.core.walk import with_progress
from peft.errors import warn
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.variants.dora import dora_caching


class DoraCaching:
    """Whether evaluation keeps what DoRA computes of adapters that are still to be trained.

    `with DoraCaching(): ...` keeps it for a while, `DoraCaching()()` from now on, until `DoraCaching()(enabled=False)`.
    """

    #: of the class, for it is one switch: what was entered and not left, the latest last; what is on from now on
    _entered: ClassVar[list[ExitStack]] = []
    _lasting: ClassVar[ExitStack] = ExitStack()

    def __call__(self, enabled: bool = True) -> None:
        self._lasting.close()
        if enabled:
            self._lasting.enter_context(dora_caching())

    def __enter__(self) -> None:
        self._entered.append(ExitStack())
        self._entered[-1].enter_context(dora_caching())

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().close()


def update_forward_signature(model: Any) -> None:
    """Gives `model.forward`, where it is `forward(*args, **kwargs)`, the base model's signature and docstring.

    Args:
        model: a [`PeftModel`]; only this object changes, not its class.
    """
    _take_over_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Gives `model.generate` the base model's signature and docstring. See `update_forward_signature`."""
    _take_over_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Gives methods of `model` the base model's signatures and docstrings.

    Args:
        model: a [`PeftModel`]; only this object changes, not its class.
        method: `"forward"`, `"generate"` or `"all"`.

    Raises:
        ValueError: another `method`.
    """
    names = {"forward": ("forward",), "generate": ("generate",), "all": ("forward", "generate")}
    if method not in names:
        raise ValueError(f"Unknown method {method!r}: choose {', '.join(map(repr, names))}.")
    for name in names[method]:
        _take_over_signature(model, name)


def _take_over_signature(model: Any, name: str) -> None:
    original = getattr(model.get_base_model(), name, None)
    of_class = getattr(type(model), name, None)
    if original is None or of_class is None:
        return
    kinds = {parameter.kind for parameter in list(inspect.signature(of_class).parameters.values())[1:]}
    if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return  # it has named arguments of its own

    # Through the class, so that a copy of the model calls itself and not the model it was copied from.
    @wraps(original, updated=())
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    del call.__wrapped__
    own, signature = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), inspect.signature(original)
    call.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    model.__dict__[name] = MethodType(call, model)


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds a saved adapter. False also where the hub cannot be asked."""
    try:
        return "peft_type" in read_config_file(model_name_or_path)
    except ValueError:
        return False


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """While it lasts, the scaling of all adapters is multiplied by a number; between 0 and 1 it weakens them.

    For LoRA this interpolates between base model and fine-tuned model (wise-ft, arXiv:2109.01903).

    Args:
        model: a model with adapters that have a scaling.
        multiplier: the factor.

    Raises:
        TypeError: `multiplier` is no number.
        ValueError: no adapter in the model has a scaling.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier must be a float, got {type(multiplier).__name__}.")
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, AdapterLayer) and getattr(module, "scaling", None)
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter layers with a scaling, such as those of LoRA.")
    if any(layer.merged for layer in layers):
        warn("Adapters that are merged into the base weights keep their scale: unmerge_adapter() first.")
    before = [layer.scaling for layer in layers]
    for layer in layers:  # replaced, so that who holds the scales of before still has those
        layer.scaling = {name: scale * multiplier for name, scale in layer.scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = {**layer.scaling, **scaling}


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """While it lasts, adapter layers leave the dtype of their input alone, as diffusers' layerwise casting needs.

    There, hooks bring a module's weights to the dtype of the input each time that it is called, factors of a LoRA too.
    Where nobody has hooks on them, it is the adapter's weights that are brought to that dtype, never the other way
    round, so there is nothing to change.

    Args:
        model: a model with adapters.
        active: False asks for no change.
    """
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)] if active else []
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(layer, "cast_input_dtype_enabled", False))
        yield


class MontecloraTrainerMixin:
    """Adds what MonteCLoRA asks for to the loss of a `transformers.Trainer`.

    To be put before it: `class MontecloraTrainer(MontecloraTrainerMixin, Trainer): ...`.
    """

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The trainer's loss, and that of the adapters in the model."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        losses = [module.monteclora_loss() for module in model.modules() if isinstance(module, LoraModel)]
        extra = sum(losses, 0.0) / max(len(losses), 1)
        return (found[0] + extra, *found[1:]) if return_outputs else found + extra


class KappaTuneSelector:
    """Ranks the weights of a model by their condition number, the largest singular value by the smallest.

    A weight with a small one treats all directions alike; what such a weight holds is said to be disturbed least by
    training (arXiv:2506.16289). Singular values of large weights take their time: minutes for a model of some billions.

    Args:
        model: the model, with or without adapters, quantised or not.
        max_dim_size_to_analyze: weights with a longer side are left out.
        moe_param_suffixes: ends of the names of stacked experts [experts, ., .], which count by the mean of theirs.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ):
        self.model, self.max_dim_size_to_analyze, self.show_progress = model, max_dim_size_to_analyze, show_progress
        experts = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
        self.moe_param_suffixes = tuple(moe_param_suffixes or experts)

    @cached_property
    def condition_numbers(self) -> dict[str, float]:
        """That of each linear module, by name."""
        modules = [(key, base_of(module)) for key, module in model_modules(self.model)]
        linear = [(key, module) for key, module in modules if isinstance(module, nn.Linear)]
        fit = [(k, m) for k, m in linear if max(m.in_features, m.out_features) <= self.max_dim_size_to_analyze]
        wanted = with_progress(fit, self.show_progress, "Singular values of modules")
        return {key: condition_number(storage_of(m, "weight").read(m, "weight")) for key, m in wanted}

    @cached_property
    def parameter_condition_numbers(self) -> dict[str, float]:
        """The mean of those of each stack of experts, by name."""
        stacks = [
            (f"{key}.{name}" if key else name, parameter)
            for key, module in model_modules(self.model)
            for name, parameter in base_of(module).named_parameters(recurse=False)
            if parameter.dim() == 3 and max(parameter.shape[1:]) <= self.max_dim_size_to_analyze
        ]
        fit = [(name, stack) for name, stack in stacks if name.endswith(self.moe_param_suffixes)]
        wanted = with_progress(fit, self.show_progress, "Singular values of experts")
        return {name: fmean(map(condition_number, stack)) for name, stack in wanted}

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear modules, those of the smallest condition number first, as `target_modules` takes them.

        Args:
            top_p: how large a share of all of them, one at least.
            num_modules: how many; goes before `top_p`.
            threshold: the largest condition number; `top_p` goes before it. Without any of the three: all.

        Raises:
            ValueError: a share that is none, or a negative number.
        """
        return _best(self.condition_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of stacks of experts, as `target_parameters` takes them; arguments as for `get_best_targets`."""
        return _best(self.parameter_condition_numbers, top_p, num_modules, threshold)


def condition_number(matrix: Tensor) -> float:
    """The largest singular value by the smallest."""
    values = torch.linalg.svdvals(matrix.detach().float())
    return float(values[0] / (values[-1] + 1e-8))


def _best(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is a share of all modules, more than 0 and at most 1; got {top_p}.")
    if num_modules is not None and num_modules < 0:
        raise ValueError(f"num_modules must be non-negative, got {num_modules}.")
    names = sorted(numbers, key=lambda name: numbers[name])
    if num_modules is not None:
        return names[:num_modules]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name in names if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The share `top_p` of a model's weights with the smallest condition numbers, as a configuration takes them.

    Args:
        model, max_dim_size_to_analyze, moe_param_suffixes, show_progress: see [`KappaTuneSelector`].
        top_p: the share, of modules and of stacks of experts each.

    Returns:
        `target_modules`, and `target_parameters` (None where there are no stacked experts):
        `LoraConfig(**find_kappa_target_modules(model))`.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
