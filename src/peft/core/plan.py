"""Targets to plan: which modules of a model a configuration means, worked out and checked before any change."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core import tensor_parallel
from peft.core.adapted import to_init_from
from peft.core.base_op import BaseOp, base_op
from peft.core.layer import AdapterLayer
from peft.core.part import as_names
from peft.core.storage import onloaded, storage_of
from peft.core.targets import (
    DUMMY_TARGET_MODULES,
    HEAD_NAMES,
    base_of,
    check_target_module_exists,
    ends_with,
    layer_index,
    linear_modules,
    matching_entry,
    model_places,
    saved_as,
    target_name,
)
from peft.core.wrappers import plain_name
from peft.errors import NoMatchingPeftModuleError, PeftRuntimeWarning, listed, warn
from peft.patterns import get_pattern_key
from peft.target_tables import LINEAR_INSIDE
from peft.values import Fits, noted

#: so many names that match nothing are named
_MANY = 20


@dataclass
class Target:
    """One place that gets an adapter: a module, or one parameter of it; `parent` holds the module as `child`."""

    key: str
    module: nn.Module
    parent: nn.Module
    child: str
    parameter_name: str | None = None

    @property
    def name(self) -> str:
        """What configurations call it."""
        return self.key if self.parameter_name is None else f"{self.key}.{self.parameter_name}"

    @cached_property
    def base(self) -> nn.Module:
        """The base module, under all adapter layers."""
        return base_of(self.module)

    @cached_property
    def op(self) -> BaseOp:
        """What kind of module it is.

        Raises:
            ValueError: none that an adapter can be put on.
        """
        op = base_op(self.base, self.parameter_name)
        if op is None:
            raise ValueError(f"{self.key!r} is a {type(self.base).__name__}, which has no weight to be adapted.")
        return op

    def start_matrix(self, waits_for_file: bool) -> Tensor:
        """The original base weight as a matrix [out, in], for what a new adapter has of it."""
        base, name, module = self.base, self.op.weight_name, self.module
        with onloaded(base):
            read = module.ledger.original if isinstance(module, AdapterLayer) else storage_of(base, name).read
            return to_init_from(self.op.matrix(read(base, name)), waits_for_file)


@dataclass
class Plan:
    """What adding one adapter will do.

    Attributes:
        targets: modules and parameters that get the adapter, in the order of the model.
        save: names of the modules that are copied and trained in full.
        left_out: modules that matched and were excluded.
        waits_for_file: whether what the layers share comes from a file, where files hold it.
    """

    targets: list[Target] = field(default_factory=list)
    save: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    waits_for_file: bool = False

    @classmethod
    def of_layers(cls, parts: Iterable[tuple[str, Any]], adapter_name: str) -> Plan:
        """The targets of an adapter that has been added, given the parts of its model by name."""
        plan = cls()
        for path, layer in parts:
            if isinstance(layer, AdapterLayer) and layer.has(adapter_name) and not layer.with_attention:
                key, parameter = target_name(path, layer), layer.parameter_name
                key = key if parameter is None else key.removesuffix(f".{parameter}")
                plan.targets.append(Target(key, layer, layer, "", parameter))
        return plan

    @property
    def module_names(self) -> list[str]:
        return [target.key for target in self.targets if target.parameter_name is None]

    @cached_property
    def layers(self) -> list[Target]:
        """Every layer that gets the adapter: the targets, and after each attention module its output projection."""
        layers = []
        for target in self.targets:
            layers.append(target)
            inner = target.base
            if isinstance(inner, nn.MultiheadAttention) and target.parameter_name is None:
                layers.append(Target(f"{target.key}.out_proj", inner.out_proj, inner, "out_proj"))
        return layers

    def warn_of_no_bias(self, what: str) -> None:
        """Warns where a module has no bias that `what` could be merged into."""
        modules = [target for target in self.targets if target.parameter_name is None]
        bare = [target.key for target in modules if getattr(target.base, target.op.bias_name or "", 0) is None]
        if bare:
            warn(f"{len(bare)} modules have no bias, as {bare[0]!r}: {what} cannot be merged into them.")

    @property
    def largest(self) -> tuple[int, int]:
        """As many outputs, and as many inputs, as the targets have at most."""
        ops = [target.op for target in self.targets]
        return max(op.out_features for op in ops), max(op.in_features for op in ops)

    @property
    def parameter_names(self) -> list[str]:
        return [target.name for target in self.targets if target.parameter_name is not None]


def make_plan(
    model: nn.Module,
    config: LayerConfig,
    layer_class: type[AdapterLayer],
    *,
    only: set[str] | None = None,
    also_target: Iterable[str] = (),
    also_save: Iterable[str] = (),
    any_kind: bool = False,
    matches: Callable[[LayerConfig, str], Any] | None = None,
) -> Plan:
    """Works out what `config` means in `model` and checks that it can be done.

    Args:
        model: the base model, with or without adapters.
        config: the configuration, its targets filled in.
        layer_class: the method's layer.
        only: names of modules to adapt instead of the configuration's targets (from a state dict).
        also_target: names of modules to adapt beyond `config.target_modules`.
        also_save: names of modules to train in full beyond `config.modules_to_save`.
        matches: what says by which entry of `config.target_modules` a name is meant, if by any.
        any_kind: leave modules of kinds that are not known to whoever puts the adapter on them.

    Raises:
        NoMatchingPeftModuleError: nothing matches.
        ValueError: a module that matches cannot carry the method.
    """
    plan, also_target, matches = Plan(), set(also_target), matches or check_target_module_exists
    used, inside_saved = set[str](), ""
    saved = {*(config.modules_to_save or ()), *also_save}
    parameters = set(getattr(config, "target_parameters", None) or ())
    names, saved_modules = list[str](), dict[str, nn.Module]()
    for key, module, parent, child in model_places(model):
        names.append(key)
        if inside_saved and key.startswith(inside_saved):
            continue
        if (entry := saved_as(key, saved)) is not None:
            _check_saved(key, module)
            saved_modules[key] = module
            used.add(entry)
            inside_saved = f"{key}."
            continue
        in_parts = _parameter_targets(Target(key, module, parent, child), parameters, used) if parameters else []
        plan.targets += in_parts
        if only is None:
            target_entry = key if key in also_target else matches(config, key)
        else:  # a layer around those of its parameters has a name of its own
            target_entry = key if plain_name(key) + ".base_layer" * len(in_parts) in only else None
        if target_entry and key:  # the model itself is in no module that could hold a layer in its place
            used.add(target_entry)
            plan.targets.append(_target_at(key, module, parent, child))
        elif key and only is None and config.exclude_modules and matching_entry(config.target_modules, key):
            plan.left_out.append(key)
    _drop_further_names(plan, saved_modules)
    _name_saved(plan, saved)
    _check_matches(plan, model, config, names, used, only)
    for target in plan.targets:
        if not (any_kind and target.parameter_name is None and base_op(target.base) is None):
            _check_target(target, config, layer_class)
    return plan


def warn_of_difference(plan: Plan, model: nn.Module, matches: Callable[[str], Any]) -> None:
    """Says where a state dict, after which `plan` was made, and a configuration, which `matches` names, differ."""
    meant = {_target_at(*place).key for place in model_places(model) if matches(place[0])}
    elsewhere = {*plan.save, *(target.key for target in plan.targets if target.parameter_name)}
    unlike = (meant ^ set(plan.module_names)) - elsewhere - {""}
    if unlike:
        warn(
            f"The state dict says which modules get an adapter, and the configuration says otherwise of"
            f" {listed(sorted(unlike))}; the former holds.",
            PeftRuntimeWarning,
        )


def _target_at(key: str, module: nn.Module, parent: nn.Module, child: str) -> Target:
    """A module that gets an adapter, or the linear layer inside of it that does."""
    inner = LINEAR_INSIDE.get(type(module).__name__)
    if inner is None:
        return Target(key, module, parent, child)
    return Target(f"{key}.{inner}", getattr(module, inner), module, inner)


def _name_saved(plan: Plan, saved: set[str]) -> None:
    """Says which modules an entry of `modules_to_save` means, where their names differ."""
    for entry in sorted(saved - HEAD_NAMES):
        names = {key.rpartition(".")[2] for key in plan.save if saved_as(key, saved) == entry}
        if len(names) > 1:
            warn(f"modules_to_save={entry!r} means all modules whose names end with it: {', '.join(sorted(names))}.")


def _drop_further_names(plan: Plan, saved: dict[str, nn.Module]) -> None:
    """Leaves one name of modules that have several: what is put on a module is in all its places."""
    # Names may mean both what is around a linear layer and the layer.
    plan.targets = list({target.name: target for target in plan.targets}.values())
    targets = {(id(target.module), target.parameter_name): target for target in reversed(plan.targets)}
    plan.targets = [target for target in plan.targets if targets[id(target.module), target.parameter_name] is target]
    first = {id(module): key for key, module in reversed(saved.items())}
    plan.save = [key for key, module in saved.items() if first[id(module)] == key]


def _check_saved(key: str, module: nn.Module) -> None:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        raise TypeError(
            f"modules_to_save cannot be applied to {key!r}, a {type(module).__name__}, which is no module that is"
            " called; name what is in it."
        )


def _parameter_targets(place: Target, wanted: set[str], used: set[str]) -> list[Target]:
    """The parameters of one module that `wanted` names, in the order the module has them."""
    base = base_of(place.module)
    targets = []
    for name, _ in base.named_parameters(recurse=False):
        entry = ends_with(f"{place.key}.{name}" if place.key else name, wanted)
        if entry is not None:
            used.add(entry)
            targets.append(replace(place, parameter_name=name))
    return targets


def _check_target(target: Target, config: LayerConfig, layer_class: type[AdapterLayer]) -> None:
    if target.parameter_name is not None and not target.key:
        raise ValueError(
            f"target_parameters={target.parameter_name!r} is a top-level parameter of the model, which cannot"
            " be wrapped."
        )
    module = target.base
    op = layer_class.op_of(module, target.parameter_name)
    if op is None or op.kind not in layer_class.kinds:
        supported = ", ".join(sorted(layer_class.kinds - {"Parameter"}))
        raise ValueError(
            f"Target module {target.key!r} is a {type(module).__name__}, which is not supported by {config.peft_type}."
            f" Supported are {supported}"
            + (", and parameters by name in target_parameters." if "Parameter" in layer_class.kinds else ".")
        )
    try:
        if op.weight_name:
            storage_of(module, op.weight_name)
    except TypeError as error:
        raise ValueError(f"Target module {target.key!r} is not supported. {error}") from None
    tensor_parallel.check(target.key, module, op)
    dropout = layer_class.dropout_setting
    if dropout is not None and getattr(config, dropout.field) and not getattr(op, dropout.needs):
        needed = "linear layers" if dropout.needs == "linear" else "modules whose input it can drop"
        raise ValueError(f"{dropout.field} needs {needed}; {target.key!r} is a {op.kind}.")
    own, kind = config.at(target.name), cast(Any, type(config))
    for name, limits in noted(kind, Fits).items():
        limits.check(name, getattr(own, name), op, target.key, config.pattern_fields)
    layer_class.check(own, target.key, module, op)


def _check_matches(
    plan: Plan, model: nn.Module, config: LayerConfig, names: list[str], used: set[str], only: set[str] | None
) -> None:
    """Raises where nothing matched; warns by name of what did not."""
    where = type(model).__name__
    asked = sorted(config.target_modules) if isinstance(config.target_modules, (set, list)) else config.target_modules
    if not plan.targets and config.target_modules != DUMMY_TARGET_MODULES and only is None:
        raise NoMatchingPeftModuleError(_nothing_matches(plan, config, asked, where, names, model))
    if only is not None and not plan.targets and not plan.save:
        found = f"which has tensors of the adapter on {listed(sorted(only)) or 'none'}"
        raise NoMatchingPeftModuleError(f"No module of {where} is among those of the state dict, {found}.")
    parameters = set(getattr(config, "target_parameters", None) or ())
    # An entry may fit only what another, longer one or another setting takes; that is a match all the same.
    if not {*(asked if isinstance(asked, list) else ()), *parameters, *(config.modules_to_save or ())} <= used:
        used = used | {".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1)}

    def missed(field: str, entries: Iterable[str], known: list[str]) -> list[str]:
        left = sorted(set(entries) - used)[:_MANY]
        return [f"{field} entry {entry!r}" + _did_you_mean(entry, known) for entry in left]

    chosen = only is None and not getattr(config, "_targets_are_defaults", False)
    unmatched = missed("target_modules", asked, names) if isinstance(asked, list) and chosen else []
    if parameters:
        unmatched += missed("target_parameters", parameters, [name for name, _ in model.named_parameters()])
    unmatched += missed("modules_to_save", set(config.modules_to_save or ()) - HEAD_NAMES, names)
    for entry in sorted(as_names(config.exclude_modules or ())):
        rule = entry if isinstance(config.exclude_modules, str) else [entry]
        if not any(matching_entry(rule, name) for name in names):
            unmatched.append(f"exclude_modules entry {entry!r}")
    for pattern_field in config.pattern_fields:
        for pattern in getattr(config, pattern_field, None) or ():
            if not any(get_pattern_key([pattern], target.name) == pattern for target in plan.targets):
                unmatched.append(f"{pattern_field} key {pattern!r}")
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is not None and only is None:
        indices = {layer_index(target.key, config.layers_pattern) for target in plan.targets}
        missing = sorted(set([wanted] if isinstance(wanted, int) else wanted) - indices)
        if missing:
            unmatched.append(f"layers_to_transform index {', '.join(map(str, missing))}")
        for pattern in as_names(config.layers_pattern or ()):
            if all(layer_index(name, pattern) is None for name in names):
                unmatched.append(f"layers_pattern {pattern!r}")
    if unmatched:
        warn(f"In {where}, nothing matches the " + "; nor the ".join(unmatched) + ".", PeftRuntimeWarning)


def _nothing_matches(
    plan: Plan, config: LayerConfig, asked: Any, where: str, names: list[str], model: nn.Module
) -> str:
    parameters = getattr(config, "target_parameters", None)
    if parameters:
        return f"target_parameters={sorted(parameters)}: no such parameter found in {where}." + _did_you_mean(
            sorted(parameters)[0], [name for name, _ in model.named_parameters()]
        )
    if plan.left_out:
        return (
            f"All modules that target_modules={asked} matches in {where} ({len(plan.left_out)}, such as"
            f" {plan.left_out[0]!r}) are left out by exclude_modules={config.exclude_modules}. Nothing is"
            " left to adapt."
        )
    saved = tuple(f"{key}." for key in plan.save)
    inside = [name for name in names if matching_entry(config.target_modules, name) and f"{name}.".startswith(saved)]
    if inside:
        return (
            f"All modules that target_modules={asked} matches in {where} ({len(inside)}, such as {inside[0]!r}) are"
            f" trained in full by modules_to_save={config.modules_to_save}. Nothing is left to adapt."
        )
    if config.layers_to_transform is not None:
        pattern = config.layers_pattern
        counted = f" (counted in layers_pattern={pattern})." if pattern else ". Check them, or give layers_pattern."
        return (
            f"No module that target_modules={asked} matches was found in {where} in layers_to_transform="
            f"{config.layers_to_transform}{counted}"
        )
    if names == [""]:
        return (
            f"The model is a {where} itself, and adapters go on modules inside a model: wrap it, in nn.Sequential say."
        )
    first = asked if isinstance(asked, str) else next(iter(asked), "")
    hint = _did_you_mean(first, names)
    if hint and isinstance(asked, str):
        hint = f" A str is a regular expression for the whole name; a list, [{asked!r}], matches last parts.{hint}"
    return f"Target modules {asked} not found in {where} ({len(linear_modules(model))} linear layers).{hint}"


def _did_you_mean(entry: str, names: Iterable[str]) -> str:
    """The nearest name, and how many modules have it; empty if there is none near."""
    names = list(names)
    tail_parts = entry.count(".") + 1
    tails: dict[str, int] = {}
    for name in names:
        tail = ".".join(name.split(".")[-tail_parts:])
        if tail and not tail.isdigit():
            tails[tail] = tails.get(tail, 0) + 1
    near = difflib.get_close_matches(entry, tails, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r} ({tails[near[0]]} modules)?" if near else ""
