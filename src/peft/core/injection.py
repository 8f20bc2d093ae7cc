"""An adapter put on a model: planned and checked first, then applied, and taken back out if that fails."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.core import making
from peft.core.around import see_to_fast_paths
from peft.core.auxiliary import save_modules
from peft.core.base_op import base_op
from peft.core.biases import TrainedBiases, note_layers, own_biases, train_biases
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.places import put_everywhere, take_away_everywhere, unite_embeddings
from peft.core.plan import Plan, make_plan
from peft.core.routing import BASE
from peft.core.slots import Buffers
from peft.core.storage import place_of
from peft.core.storage.gradients import blocking
from peft.core.storage.sharded import agree, average_gradients, reshard
from peft.core.targets import (
    ALL_LINEAR,
    CLASSIFIER_NAMES,
    all_linear,
    base_of,
    model_modules,
    shortened,
    state_dict_targets,
    target_name,
)
from peft.core.tokens import token_rows, train_tokens
from peft.core.tying import tie_configuration, tied_embedding_modules, warn_of_tied_targets
from peft.core.undo import hand_over
from peft.core.walk import base_parameters, live_key, model_config_of, put_back
from peft.errors import PeftWarning

if TYPE_CHECKING:
    from peft.core.tuner import BaseTuner


def inject(
    tuner: BaseTuner,
    model: nn.Module,
    adapter_name: str,
    config: Any,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
    any_kind: bool = False,
) -> None:
    """Adds an adapter; what `BaseTuner.inject_adapter` does. A call that raises leaves model and `config` as before."""
    check_adapter_name(adapter_name)
    reshard()
    with _no_garbage_collection(), ExitStack() as undo:
        undo.callback(_put_back, config, dict(config.__dict__))
        config = tuner._prepare_adapter_config(config, model_config_of(model))
        method = tuner.method(config)
        plan, tokens = _planned(tuner, model, adapter_name, config, undo, state_dict, any_kind)

        before = Before(tuner, model)
        undo.callback(see_to_fast_paths, model)
        undo.callback(_take_out, tuner, method, model, adapter_name, before)
        tied = tied_embedding_modules(model) if getattr(config, "ensure_weight_tying", False) else []
        without_memory = plan.waits_for_file = low_cpu_mem_usage and method.start_is_replaceable(config)
        share(method, plan, config, adapter_name)
        device = torch.device("meta") if without_memory else nullcontext()
        with device, own_biases(before.parts), method.drawing(config):
            _apply(tuner, plan, config, adapter_name)
            save_modules(model, plan.save, adapter_name, tied)
            train_tokens(model, adapter_name, tokens)
        _join(tuner, model, plan, config, adapter_name, tied, before, autocast_adapter_dtype)
        for layer in tuner.layers():
            changed = layer.settle(adapter_name)
            if changed is not None:
                undo.callback(layer.unsettle, changed)
        for part in tuner.layers() if tuner._stays else ():
            part.leave_shared()
        _warn_of_lost_gradients(model, config)
        method.added(adapter_name)
        hand_over(undo)


def _planned(
    tuner: BaseTuner,
    model: nn.Module,
    adapter_name: str,
    config: Any,
    undo: ExitStack,
    state_dict: dict[str, Tensor] | None,
    any_kind: bool,
) -> tuple[Plan, dict[str, list[int]]]:
    """What is to be adapted, and the rows of embeddings to be trained; all that can be refused is refused here."""
    _check_bias(tuner, adapter_name, config)
    method = tuner.method(config)
    method.check_config(adapter_name, config)
    if config.target_modules == ALL_LINEAR:
        heads = CLASSIFIER_NAMES if config.task_type == "SEQ_CLS" else ()
        config.target_modules = all_linear(model, {*(config.modules_to_save or ()), *heads})
    config.target_modules = shortened(config.target_modules, model)
    restructured = method.prepare_model(config, model)
    if restructured is not None:
        undo.callback(restructured)
    also_target, also_save = tie_configuration(config, model)
    only = state_dict_targets(state_dict, method.prefix) if state_dict is not None else None
    plan = make_plan(
        model, config, method.layer_class, only=only, also_target=also_target, also_save=also_save,
        any_kind=any_kind, matches=tuner._check_target_module_exists,
    )  # fmt: skip
    method.check_plan(plan, config)
    united = unite_embeddings(model, plan)
    if united is not None:
        undo.callback(united)
    tokens = token_rows(config, model)
    warn_of_tied_targets(plan.module_names, config, model)
    _note_layout(config, plan)
    return plan, tokens


def _join(
    tuner: BaseTuner,
    model: nn.Module,
    plan: Plan,
    config: Any,
    adapter_name: str,
    tied: Sequence[str],
    before: Before,
    autocast_adapter_dtype: bool,
) -> None:
    """Makes the adapter, which is on its layers now, one of the model's: dtypes, ties, what is trained, processes."""
    method = tuner.method(config)
    put_everywhere(model)
    method.planned = {}
    tuner._parts = None
    tuner.targeted_module_names = list(dict.fromkeys(tuner.targeted_module_names + plan.module_names))
    tuner.targeted_parameter_names = list(dict.fromkeys(tuner.targeted_parameter_names + plan.parameter_names))
    tuner.peft_config[adapter_name] = config
    tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
    tie_layers(tuner, model, tied, adapter_name)
    _freeze_base(tuner, before)
    if getattr(config, "bias", "none") != "none":
        layer_class = None if config.bias == "all" else method.layer_class
        train_biases(tuner.parts(), model, adapter_name, layer_class)
        tuner._parts = None
    note_layers(tuner.parts())
    see_to_fast_paths(model)
    _join_in(tuner, before, adapter_name)
    agree((tensor for _, part in tuner.parts() for tensor in part.tensors(adapter_name)), model)
    average_gradients(model)
    average_gradients(tuner)  # which may hold more
    model.peft_config = tuner.peft_config  # type: ignore[assignment]


def share(method: Method, plan: Plan, config: Any, adapter_name: str) -> None:
    """Makes what the layers of an adapter share, on the device of the base, and works out the place of each.

    What a file is about to bring may be made without memory.
    """
    settings = method.plan_settings(plan, config)
    method.planned = {
        (id(layer.base), layer.parameter_name): settings[layer.name] for layer in plan.layers if layer.name in settings
    }
    if not method.shared or not plan.targets:
        return
    with torch.device("cpu"):  # also where the adapter itself is made without memory: it may not be in the file
        made = method.share(plan, config, adapter_name)
        if plan.waits_for_file and any(
            _is_blank(made[name]) and not method.slot(name).is_stored(config, name) for name in made
        ):
            plan.waits_for_file = False
            made = method.share(plan, config, adapter_name)
    device = place_of(plan.targets[0].base)[0]

    def placed(tensor: Tensor) -> Tensor:
        return tensor if device is None or device.type == "meta" or tensor.is_meta else tensor.to(device)

    for name, value in made.items():
        container: Any = method.shared[name]
        if isinstance(value, nn.Module):
            container[adapter_name] = value if device is None else value.to(device)
        elif isinstance(value, Tensor):
            container[adapter_name] = nn.Parameter(placed(value)) if method.slot(name).trained else placed(value)
        else:
            groups = nn.ParameterDict() if method.slot(name).trained else Buffers(container.persistent)
            for group, tensor in value.items():
                groups[group] = placed(tensor)
            container[adapter_name] = groups


def share_again(tuner: BaseTuner, adapter_name: str) -> None:
    """Makes what the layers of an adapter share and no file has brought."""
    config = tuner.peft_config[adapter_name]
    method = tuner.method(config)
    every: dict[str, Any] = dict(method.shared)
    containers = {name: held for name, held in every.items() if adapter_name in held}
    if not any(_is_blank(held[adapter_name]) for held in containers.values()):
        return
    before = {name: held[adapter_name] for name, held in containers.items()}
    share(method, Plan.of_layers(tuner.parts(), adapter_name), config, adapter_name)
    method.planned = {}
    for name, old in before.items():
        new = containers[name][adapter_name]
        if isinstance(old, Tensor):
            containers[name][adapter_name] = new if old.is_meta else old
        elif isinstance(old, (nn.ParameterDict, Buffers)):
            for group in old:
                new[group] = new[group] if old[group].is_meta else old[group]


def fill_in(tuner: BaseTuner, adapter_name: str) -> None:
    """Gives tensors of an adapter that are still without memory the values of a fresh adapter."""
    share_again(tuner, adapter_name)
    config = tuner.peft_config[adapter_name]
    for key, part in tuner.parts():
        if isinstance(part, AdapterLayer) and part.has(adapter_name) and making.lacks(part, adapter_name):
            settings = tuner.method(config).layer_settings(config, target_name(key, part))
            making.fill_in(part, adapter_name, config, settings)
    if getattr(config, "ensure_weight_tying", False):
        tie_layers(tuner, tuner.model, tied_embedding_modules(tuner.model), adapter_name)


def _is_blank(value: Any) -> bool:
    """Whether a tensor, or one of those of a group each or of a module, has no memory."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    return any(tensor.is_meta for tensor in ([value] if isinstance(value, Tensor) else value.values()))


def _warn_of_lost_gradients(model: nn.Module, config: Any) -> None:
    blocked = [] if config.inference_mode else blocking((key, base_of(m)) for key, m in model_modules(model))
    if blocked:
        warnings.warn(
            f"{len(blocked)} layers, such as {blocked[0]!r}, quantise their input and pass no gradient on to it, so"
            " what is before them is trained wrongly, or not at all. prepare_model_for_kbit_training(model) lets"
            " gradients through.",
            PeftWarning,
            stacklevel=2,
        )


def check_adapter_name(name: str) -> None:
    """Raises ValueError where a string cannot name an adapter."""
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise ValueError(f"{name!r} cannot name an adapter: a name is a string without dots, and not {BASE!r}.")


def tie_layers(tuner: BaseTuner, model: nn.Module, keys: Sequence[str], adapter_name: str) -> None:
    """Makes an adapter on tied modules the same on all of them."""
    method = tuner.method(tuner.peft_config[adapter_name])
    found = (model.get_submodule(live_key(model, key)) for key in keys)
    layers = [tuner._find_layer(module, None, method.layer_class) for module in found]
    here = [layer for layer in layers if layer is not None and layer.has(adapter_name)]
    for layer in here[1:]:
        method.tie(layer, here[0], adapter_name)


class Before:
    """What an adapter that cannot be added must leave as it was, beside the modules themselves."""

    def __init__(self, tuner: BaseTuner, model: nn.Module):
        self.parts = tuner.parts()
        self.disabled = tuner.disabled
        self._states = [(part, part.active_adapters) for _, part in self.parts]
        self._active = tuner.active_adapters
        self._targets = list(tuner.targeted_module_names), list(tuner.targeted_parameter_names)
        self.trained = [(parameter, parameter.requires_grad) for _, parameter in base_parameters(model)]
        self._has_record = "peft_config" in model.__dict__

    def restore(self, tuner: BaseTuner, model: nn.Module) -> None:
        for part, active in self._states:
            if part.active_adapters != active:
                part.set_adapter(active)
        tuner._active = self._active
        tuner.targeted_module_names, tuner.targeted_parameter_names = self._targets
        for parameter, requires_grad in self.trained:
            parameter.requires_grad_(requires_grad)
        if not self._has_record and "peft_config" in model.__dict__:
            del model.peft_config


def _check_bias(tuner: BaseTuner, adapter_name: str, config: Any) -> None:
    """Raises where an adapter asks to train biases in a way that is unknown, or beside another adapter."""
    kind, bias = type(tuner).__name__, getattr(config, "bias", "none")
    if bias not in ("none", "all") and not bias.endswith("_only"):  # some write their own name, some "lora_only"
        own = f"{tuner.method(config).prefix.rstrip('_').split('_')[0]}_only"
        raise NotImplementedError(f"bias={bias!r} is not known; use 'none', 'all' or {own!r}.")
    others = [name for name in tuner.peft_config if name != adapter_name]
    if bias != "none" and others:
        raise ValueError(
            f"{kind} supports only 1 adapter with bias; {', '.join(others)} is there already. Set bias to 'none' for"
            " all adapters."
        )


def _note_layout(config: Any, plan: Plan) -> None:
    """Lets `fan_in_fan_out` say how the layers hold their weight, for those who read the configuration's file."""
    if hasattr(config, "fan_in_fan_out"):
        ops = (base_op(base_of(target.module)) for target in reversed(plan.targets) if not target.parameter_name)
        last = next((op for op in ops if op is not None and op.linear), None)
        if last is not None:
            config.fan_in_fan_out = last.kind == "Conv1D"


def _apply(tuner: BaseTuner, plan: Plan, config: Any, adapter_name: str) -> None:
    for target in sorted(plan.targets, key=lambda target: target.parameter_name is not None):
        # By now it may be a layer, if another parameter of the module came before.
        module: Any = target.parent._modules[target.child] if target.child else target.parent
        extra = {} if target.parameter_name is None else {"parameter_name": target.parameter_name}
        tuner._create_and_replace(
            config, adapter_name, module, target.child, target.parent, current_key=target.key, **extra
        )


def _freeze_base(tuner: BaseTuner, before: Before) -> None:
    """Freezes the base model, but for the biases that adapters have trained in place of its own."""
    biases = [part for _, part in before.parts if isinstance(part, TrainedBiases)]
    trained = {id(p) for part in biases for name in part.adapter_names() for p in part.adapter_parameters(name)}
    for parameter, _ in before.trained:
        if id(parameter) not in trained:
            parameter.requires_grad = False


def _join_in(tuner: BaseTuner, before: Before, adapter_name: str) -> None:
    """Makes the adapter active if it is the first, and brings its new parts into the state of the others."""
    inference_mode = tuner.peft_config[adapter_name].inference_mode
    is_first = not tuner.active_adapters
    if is_first:
        tuner.set_adapter(adapter_name, inference_mode=inference_mode)
    old, active = {id(part) for _, part in before.parts}, tuner.active_adapters
    for _, part in tuner.parts():
        if id(part) not in old:
            if not is_first:
                part.set_adapter(active, inference_mode)
            part.enable_adapters(not before.disabled)


def _take_out(tuner: BaseTuner, method: Method, model: nn.Module, adapter_name: str, before: Before) -> None:
    """Takes an adapter that could not be added back out."""
    old = {id(part) for _, part in before.parts}
    tuner._parts, left = None, {}
    for key, part in reversed(tuner.parts()):
        if id(part) in old:
            part.delete_adapter(adapter_name)
        else:
            left[part] = part.unload(merge=False)
            put_back(model, key, left[part])
    take_away_everywhere(model, left)
    tuner.forget_shared(method, adapter_name)
    method.planned = {}
    tuner._parts = None
    tuner.peft_config.pop(adapter_name, None)
    before.restore(tuner, model)
    method.removed(adapter_name)


def _put_back(thing: Any, attributes: dict[str, Any]) -> None:
    """Gives an object the attributes that it had."""
    thing.__dict__.clear()
    thing.__dict__.update(attributes)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While it lasts, cyclic garbage is left: tens of thousands of new modules make Python look for it all the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
