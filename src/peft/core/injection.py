"""An adapter put on a model: planned and checked first, then applied, and taken back out if that fails."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.around import is_read, see_to_fast_paths
from peft.core.auxiliary import save_modules
from peft.core.base_op import AttentionOp, base_op
from peft.core.biases import note_layers, own_biases, train_biases
from peft.core.layer import AdapterLayer
from peft.core.method import Adapters, Method
from peft.core.model_config import model_config_of
from peft.core.part import check_adapter_name, tensors_in, trained_in
from peft.core.places import part_embeddings, put_everywhere, take_away_everywhere, unite_embeddings
from peft.core.plan import Plan, make_plan, warn_of_difference
from peft.core.routing import without_samples
from peft.core.storage.gradients import blocking, keep_open
from peft.core.storage.sharded import agree, average_gradients, reshard
from peft.core.targets import (
    base_of,
    check_target_module_exists,
    has_default_targets,
    model_modules,
    named_targets,
    state_dict_targets,
    target_name,
)
from peft.core.tokens import TrainableTokensLayer, token_rows, train_tokens
from peft.core.tying import tie_configuration, tied_embedding_modules, warn_of_tied_targets
from peft.core.undo import as_before, hand_over
from peft.core.walk import base_parameters, live_key, live_modules, put_back
from peft.core.whole import alone
from peft.core.wrappers import held
from peft.errors import warn


class Injector(Adapters):
    """A model that adapters are added to."""

    #: whether it stays with the model; one that is made for an injection is thrown away
    _stays = True

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        config: Any = None,
    ) -> None:
        """Adds an adapter: plans, checks, and only then changes the model.

        A call that raises leaves model and `config` as before.

        Args:
            model: the base model.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
            low_cpu_mem_usage: make tensors on the meta device.
            state_dict: tensors whose names decide which modules get the adapter.
            config: its configuration; `self.peft_config[adapter_name]` if None.
        """
        config = config or self.peft_config[adapter_name]
        check_adapter_name(adapter_name)
        reshard()
        with alone(self), _no_garbage_collection(), ExitStack() as undo:
            undo.callback(as_before(config))
            config = self._prepare_adapter_config(config, model_config_of(model))
            method = self.method(config)
            plan, tokens = self._plan(adapter_name, config, undo, state_dict)

            before = Before(self, model)
            undo.callback(as_before(self))
            undo.callback(as_before(model))
            undo.callback(see_to_fast_paths, model)
            undo.callback(self._take_out, method, adapter_name, before)
            tied = tied_embedding_modules(model) if getattr(config, "ensure_weight_tying", False) else []
            without_memory = plan.waits_for_file = low_cpu_mem_usage and method.start_is_replaceable(config)
            method.make_shared(plan, config, adapter_name)
            device = torch.device("meta") if without_memory else nullcontext()
            with device, own_biases(before.parts), method.drawing(config):
                self._put_on(plan, config, adapter_name)
                save_modules(model, {key: live_key(model, key) for key in plan.save}, adapter_name, tied)
                train_tokens(model, adapter_name, tokens)
            self._join(adapter_name, config, plan, tied, before, autocast_adapter_dtype)
            self._change_base(adapter_name, undo)
            for part in self.adapter_layers() if self._stays else ():
                part.leave_shared()
            keep_open(module for _, module in live_modules(model))
            _warn_of_lost_gradients(model, config)
            method.added(adapter_name)
            hand_over(undo)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a dictionary; of type "custom" where it has none."""
        return model_config_of(model) or {"model_type": "custom"}

    @staticmethod
    def _check_target_module_exists(config: Any, key: str) -> Any:
        return check_target_module_exists(config, key)

    def _prepare_adapter_config(self, config: Any, model_config: dict[str, Any]) -> Any:
        """Fills in the defaults for the model type."""
        method = self.method(config)
        known = has_default_targets(config.peft_type, model_config.get("model_type"))
        if config.target_modules is None and getattr(config, "target_parameters", None) and not known:
            config.target_modules = set()
        elif config.target_modules is None:
            method.choose_targets(config, model_config)
            config._targets_are_defaults = True
        method.complete_config(config, model_config)
        return config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Puts an adapter on one module: on the layer of this method that is there, or on a new one around it."""
        named = current_key if parameter_name is None else f"{current_key}.{parameter_name}"
        method = self.method(peft_config)
        layer = self._find_layer(
            target, parameter_name, method.layer_class, partial(method.is_for, peft_config, current_key)
        )
        if layer is None:
            if isinstance(target, TrainableTokensLayer):
                target.part_from(part for _, part in self.parts())
            layer = method.make_layer(peft_config, target, parameter_name, current_key)
            layer.share(method.shared)
            layer.without_samples, layer.is_read = without_samples(current_key), is_read(self.model, current_key)
            self._replace_module(parent, target_name, layer, target)
        planned = method.planned.get((id(layer.get_base_layer()), parameter_name))
        method.add(layer, adapter_name, peft_config, named, planned)
        if isinstance(layer.op, AttentionOp):
            # Its output projection is a module that is read, not called, and gets a layer of its own. What the
            # configuration says of the attention module (a rank, say) holds for both.
            attention: Any = layer.get_base_layer()
            self._create_and_replace(
                peft_config, adapter_name, attention.out_proj, "out_proj", attention, current_key=current_key
            )
            attention.out_proj.is_read = attention.out_proj.with_attention = True

    def _find_layer(
        self,
        module: nn.Module,
        parameter_name: str | None,
        kind: type[AdapterLayer],
        fits: Callable[[AdapterLayer], bool],
    ) -> AdapterLayer | None:
        """The layer of a method among those that wrap a module, if one fits."""
        while isinstance(module, AdapterLayer):
            if isinstance(module, kind) and module.parameter_name == parameter_name and fits(module):
                return module
            module = module.base_layer
        return None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts `new_module`, which wraps `child`, in its place."""
        new_module.__dict__["training"] = child.training  # it has no adapters yet, and `train()` would walk through it
        setattr(parent, child_name, new_module)

    def fill_in(self, adapter_name: str) -> None:
        """Gives tensors of an adapter that are still without memory the values of a fresh adapter."""
        config = self.peft_config[adapter_name]
        method = self.method(config)
        method.make_shared_again(adapter_name)
        for key, part in self.parts():
            if isinstance(part, AdapterLayer) and part.has(adapter_name) and part.lacks(adapter_name):
                name = target_name(key, part)
                part.fill_in(adapter_name, config, config.at(name), **method.layer_settings(config, name))
        if getattr(config, "ensure_weight_tying", False):
            self._tie_layers(tied_embedding_modules(self.model), adapter_name)

    def _tie_layers(self, keys: Sequence[str], adapter_name: str) -> None:
        """Makes an adapter on tied modules the same on all of them."""
        method = self.method(self.peft_config[adapter_name])
        found = (held(self.model.get_submodule(live_key(self.model, key))) for key in keys)
        layers = [self._find_layer(m, None, method.layer_class, lambda it: it.has(adapter_name)) for m in found]
        here = [layer for layer in layers if layer is not None]
        for layer in here[1:]:
            method.tie(layer, here[0], adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Brings an adapter to the dtype it is trained in: its base weight's, but float32 in place of halves."""
        shared: torch.dtype | None = None  # what layers share is as in the first of them
        for _, part in self.parts():
            if isinstance(part, AdapterLayer) and part.has(adapter_name):
                dtype = trained_in(part.place()[1], autocast_adapter_dtype)
                shared = shared or dtype
                if dtype is not None and part.dtype_of(adapter_name) != dtype:
                    part.move(adapter_name, dtype=dtype)
        for method in self._methods.values():
            method.cast_shared(adapter_name, shared)

    def _plan(
        self, name: str, config: Any, undo: ExitStack, state_dict: dict[str, Tensor] | None
    ) -> tuple[Plan, dict[str, list[int]]]:
        """What is to be adapted, and the rows of embeddings to be trained; all that can be refused is refused here."""
        self._check_bias(name, config)
        model, method = self.model, self.method(config)
        method.check_config(name, config)
        part_embeddings(model, undo)
        config.target_modules = named_targets(config, model)
        restructured = method.prepare_model(config, model)
        if restructured is not None:
            undo.callback(restructured)
        also_target, also_save = tie_configuration(config, model)
        only = state_dict_targets(state_dict, method.prefix) if state_dict is not None else None
        # Some packages replace it, or name layers, for kinds of modules of their own.
        replaced = type(self)._create_and_replace is not Injector._create_and_replace
        any_kind = replaced or bool(getattr(config, "_custom_modules", None))
        plan = make_plan(
            model, config, method.layer_class, only=only, also_target=also_target, also_save=also_save,
            any_kind=any_kind, matches=self._check_target_module_exists,
        )  # fmt: skip
        method.check_plan(plan, config)
        if only is not None:
            warn_of_difference(plan, model, partial(self._check_target_module_exists, config))
        unite_embeddings(model, plan, config, undo)
        tokens = token_rows(config, model)
        warn_of_tied_targets(plan.module_names, config, model)
        _note_layout(config, plan)
        return plan, tokens

    def _check_bias(self, adapter_name: str, config: Any) -> None:
        """Raises where an adapter asks to train biases in a way that is unknown, or beside another adapter."""
        kind, bias = type(self).__name__, getattr(config, "bias", "none")
        if bias not in ("none", "all") and not bias.endswith("_only"):  # some write their own name, some "lora_only"
            own = f"{self.method(config).prefix.rstrip('_').split('_')[0]}_only"
            raise NotImplementedError(f"bias={bias!r} is not known; use 'none', 'all' or {own!r}.")
        others = [name for name in self.peft_config if name != adapter_name]
        if bias != "none" and others:
            raise ValueError(
                f"{kind} supports only 1 adapter with bias; {', '.join(others)} is there already. Set bias to 'none'"
                " for all adapters."
            )

    def _put_on(self, plan: Plan, config: Any, adapter_name: str) -> None:
        """Puts the adapter on each module and parameter."""
        for target in sorted(plan.targets, key=lambda target: target.parameter_name is not None):
            # By now it may be a layer, if another parameter of the module came before.
            module: Any = held(target.parent._modules[target.child]) if target.child else target.parent
            extra = {} if target.parameter_name is None else {"parameter_name": target.parameter_name}
            self._create_and_replace(
                config, adapter_name, module, target.child, target.parent, current_key=target.key, **extra
            )

    def _join(
        self, name: str, config: Any, plan: Plan, tied: Sequence[str], before: Before, autocast_adapter_dtype: bool
    ) -> None:
        """Makes the adapter, now on its layers, one of the model's: dtypes, ties, what is trained, processes."""
        model, method = self.model, self.method(config)
        put_everywhere(model)
        method.planned = {}
        self._parts = None
        self.targeted_module_names = list(dict.fromkeys(self.targeted_module_names + plan.module_names))
        self.targeted_parameter_names = list(dict.fromkeys(self.targeted_parameter_names + plan.parameter_names))
        self.peft_config[name] = config
        self._cast_adapter_dtype(name, autocast_adapter_dtype)
        self._tie_layers(tied, name)
        self._freeze_base(before)
        if getattr(config, "bias", "none") != "none":
            layer_class = None if config.bias == "all" else method.layer_class
            train_biases(self.parts(), model, name, layer_class)
            self._parts = None
        note_layers(self.parts())
        see_to_fast_paths(model)
        self._join_in(before, name)
        parts = [tensor for _, part in self.parts() for tensor in part.tensors(name)]
        agree((*parts, *tensors_in(method.shared.values(), name)), model)
        average_gradients(model)
        average_gradients(self)  # which may hold more
        model.peft_config = self.peft_config  # type: ignore[assignment]

    def _change_base(self, name: str, undo: ExitStack) -> None:
        """Takes out of the base weights what the start of an adapter has taken from them."""
        layers = [layer for layer in self.adapter_layers() if layer.has(name)]
        lacking = {other: None for layer in layers for other in sorted(layer.ledger.taken_by - {name})}
        changed = set()
        for layer in layers:
            before = layer.change_base(name)
            if before is not None:
                undo.callback(layer.restore_base, before)
                undo.callback(layer.ledger.taken_by.discard, name)
                layer.ledger.taken_by.add(name)
                changed.add(layer.get_base_layer())
        there = (layer for layer in self.adapter_layers() if layer.get_base_layer() in changed)
        others = {other: None for layer in there for other in layer.adapter_names() if other != name}
        if lacking and not others:
            warn(
                f"Adapter {name!r} is on base weights that lack what {', '.join(lacking)} started with: it acts"
                " differently there if it was trained without, and acts differently without if it is trained there."
                " Give each a base model of its own, or save the other as a plain LoRA"
                " (path_initial_model_for_weight_conversion)."
            )
        if others:
            warn(
                f"Adapter {name!r} starts with a part of the base weights, which do without it from now on: so"
                f" {', '.join(others)} will act differently, and {name!r} too if it was saved on the base model as that"
                " once was. Give each a base model of its own, or save them as plain LoRAs"
                " (path_initial_model_for_weight_conversion).",
            )

    def _freeze_base(self, before: Before) -> None:
        """Freezes the base model when its first adapter comes; what is trained of it later on is its owner's choice."""
        if not any(part.adapter_names() for _, part in before.parts):
            for _, parameter in base_parameters(self.model):
                parameter.requires_grad = False

    def _join_in(self, before: Before, adapter_name: str) -> None:
        """Makes the adapter active if it is the first, and brings its new parts into the state of the others."""
        inference_mode = self.peft_config[adapter_name].inference_mode
        is_first = not self.active_adapters
        if is_first:
            self.set_adapter(adapter_name, inference_mode)
        old, active = {id(part) for _, part in before.parts}, self.active_adapters
        for _, part in self.parts():
            if id(part) not in old:
                if not is_first:
                    part.set_adapter(active, inference_mode)
                part.enable_adapters(not before.disabled)

    def _take_out(self, method: Method, adapter_name: str, before: Before) -> None:
        """Takes an adapter that could not be added back out."""
        old = {id(part) for _, part in before.parts}
        self._parts, left = None, {}
        for key, part in reversed(self.parts()):
            if id(part) in old:
                part.delete_adapter(adapter_name)
            else:
                left[part] = part.unload(merge=False)
                put_back(self.model, key, left[part])
        take_away_everywhere(self.model, left)
        method.forget_shared(adapter_name)
        method.planned = {}
        self._parts = None
        self.peft_config.pop(adapter_name, None)
        before.restore()
        method.removed(adapter_name)


def _warn_of_lost_gradients(model: nn.Module, config: Any) -> None:
    blocked = [] if config.inference_mode else blocking((key, base_of(m)) for key, m in model_modules(model))
    if blocked:
        warn(
            f"{len(blocked)} layers, such as {blocked[0]!r}, quantise their input and pass no gradient on to it, so"
            " what is before them is trained wrongly, or not at all. prepare_model_for_kbit_training(model) lets"
            " gradients through."
        )


class Before:
    """What an adapter that cannot be added must leave as it was, beside the modules themselves."""

    def __init__(self, tuner: Injector, model: nn.Module):
        self.parts = tuner.parts()
        self.disabled = tuner.disabled
        self._states = [(part, part.active_adapters) for _, part in self.parts]
        self.trained = [(parameter, parameter.requires_grad) for _, parameter in base_parameters(model)]

    def restore(self) -> None:
        for part, active in self._states:
            if part.active_adapters != active:
                part.set_adapter(active)
        for parameter, requires_grad in self.trained:
            parameter.requires_grad_(requires_grad)


def _note_layout(config: Any, plan: Plan) -> None:
    """Lets `fan_in_fan_out` say how the layers hold their weight, for those who read the configuration's file."""
    if hasattr(config, "fan_in_fan_out"):
        ops = (base_op(base_of(target.module)) for target in reversed(plan.targets) if not target.parameter_name)
        last = next((op for op in ops if op is not None and op.linear), None)
        if last is not None:
            config.fan_in_fan_out = last.kind == "Conv1D"


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
