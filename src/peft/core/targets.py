"""Names of modules: which of a model's modules a configuration means by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from peft import patterns
from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.base_op import LinearOp, ParameterOp, TransposedOp, base_op
from peft.core.layer import AdapterLayer
from peft.core.model_config import embeddings_of, model_config_of
from peft.core.wrappers import held, plain_name
from peft.target_tables import DEFAULT_TARGETS

#: what names of tensors in files begin with
ROOT = "base_model.model."
#: stands for "nothing", for configurations whose targets come from elsewhere
DUMMY_TARGET_MODULES = "dummy-target-modules"
ALL_LINEAR = "all-linear"
#: heads that the task classes add to `modules_to_save` without knowing which of them a model has
CLASSIFIER_NAMES = frozenset(("classifier", "score"))
HEAD_NAMES = CLASSIFIER_NAMES | {"qa_outputs"}
#: from as many names on, a list of whole names is written shorter
_MANY = 20


def model_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules under the names they have without adapters; adapted ones as their adapter layer."""
    return ((key, module) for key, module, _, _ in model_places(model))


def model_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, str]]:
    """`model_modules`, each with the module that holds it and the name it has there (of the model: itself, "")."""
    waiting: list[tuple[str, nn.Module, nn.Module, str]] = [("", model, model, "")]
    while waiting:
        key, module, parent, child = waiting.pop()
        if isinstance(module, ModulesToSaveWrapper):  # what an adapter trains in full, others may change
            parent, child = module, "original_module"
        module = held(module)
        yield key, module, parent, child
        base = base_of(module)
        if base._modules:
            prefix = f"{key}." if key else ""
            children = reversed(base._modules.items())
            waiting += [(prefix + name, inner, base, name) for name, inner in children if inner is not None]


def target_name(path: str, layer: AdapterLayer) -> str:
    """The name by which configurations mean what a layer adapts, given where the layer is in the model."""
    key = ".".join(part for part in path.split(".") if part not in ("base_layer", "original_module"))
    if isinstance(layer.op, ParameterOp):
        return f"{key}.{layer.op.weight_name}"
    # The output projection of attention comes with the attention module.
    return key.removesuffix(".out_proj") if layer.with_attention else key


def ends_with(key: str, names: Iterable[str]) -> str | None:
    """Which of `names` a dotted key is, or ends with, whole parts only; the longest if several."""
    names = names if isinstance(names, (set, frozenset, dict)) else set(names)
    start = 0
    while True:
        if key[start:] in names:
            return key[start:]
        dot = key.find(".", start)
        if dot < 0:
            return None
        start = dot + 1


def saved_as(key: str, names: Iterable[str]) -> str | None:
    """Which entry of `modules_to_save` means the module `key`: the longest that its name ends with, part of a word too.

    So it is in huggingface/peft: "norm" means input_layernorm as well.
    """
    return max((name for name in names if name and key.endswith(name)), key=len, default=None)


def modules_named(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The model's modules that `names` mean, outermost only."""
    names = set(names)
    found: list[str] = []
    for key, _ in model_modules(model):
        if saved_as(key, names) and not any(key.startswith(f"{outer}.") for outer in found):
            found.append(key)
    return found


def base_of(module: nn.Module) -> Any:
    """A module without the adapter layers around it."""
    return module.get_base_layer() if isinstance(module, AdapterLayer) else module


def matching_entry(wanted: str | Iterable[str] | None, key: str) -> str | None:
    """The entry of `target_modules` or `exclude_modules` that means `key`, if any."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return wanted if patterns.fullmatch(wanted, key) else None
    return ends_with(key, wanted)


def layer_index(key: str, layers_pattern: str | Iterable[str] | None) -> int | None:
    """The number of the layer that a module belongs to, as `layers_to_transform` counts: the outermost that fits."""
    given, parts = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ()), key.split(".")
    for pattern in given or [r"[^.]*"]:
        for place in range(1, len(parts) - 1):
            before = ".".join(parts[:place])
            if parts[place].isdecimal() and (
                patterns.fullmatch(rf".*\.(?:{pattern})", before) or (given and patterns.fullmatch(pattern, before))
            ):
                return int(parts[place])
    return None


def check_target_module_exists(config: Any, key: str) -> str | None:
    """The entry of `config.target_modules` by which the module `key` gets an adapter, or None."""
    if matching_entry(getattr(config, "exclude_modules", None), key):
        return None
    targets = config.target_modules
    if targets is None or targets == DUMMY_TARGET_MODULES:
        return None
    entry = matching_entry(targets, key)
    wanted = getattr(config, "layers_to_transform", None)
    if entry is None or entry == key or wanted is None:
        return entry
    index = layer_index(key, getattr(config, "layers_pattern", None))
    return entry if index in ([wanted] if isinstance(wanted, int) else wanted) else None


def has_default_targets(peft_type: str | None, model_type: str | None) -> bool:
    """Whether it is known what a method adapts in models of this type."""
    return model_type in DEFAULT_TARGETS.get(peft_type or "", {})


def default_targets(peft_type: str, model_type: str | None, model: nn.Module) -> set[str] | str:
    """What a method adapts in models of this type.

    Raises:
        ValueError: nothing is known of the type.
    """
    targets = DEFAULT_TARGETS.get(peft_type, {}).get(model_type or "")
    if targets is None:
        known = f"model type {model_type!r}" if model_type else type(model).__name__
        linear = sorted({key.rpartition(".")[2] for key in linear_modules(model)})
        raise ValueError(
            f"Please specify `target_modules` in the configuration: there are no defaults for {known}."
            + (f" Its linear layers are called {', '.join(linear[:12])}." if linear else "")
        )
    return targets if isinstance(targets, str) else set(targets)


def named_targets(config: Any, model: nn.Module) -> Any:
    """`target_modules`, with the defaults of the model's type in place of None, and names in place of "all-linear".

    As few names as do, where there are many.

    Raises:
        ValueError: there are no defaults for it.
    """
    targets = config.target_modules
    if targets is None:
        targets = default_targets(config.peft_type, model_config_of(model).get("model_type"), model)
    many = _MANY
    if targets == ALL_LINEAR:
        heads = CLASSIFIER_NAMES if config.task_type == "SEQ_CLS" else ()
        # The short ones: for some methods, layers that one name means belong together.
        targets, many = all_linear(model, {*(config.modules_to_save or ()), *heads}), 0
    if not isinstance(targets, (set, list)) or len(targets) < many:
        return targets
    again = getattr(config, "feedforward_modules", None)  # IA3's configuration names some of them a second time
    return shortened(set(targets), model, again if isinstance(again, set) else set())


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers, transposed ones too."""
    return [key for key, module in model_modules(model) if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, AdapterLayer):
        return module.op.linear
    return not isinstance(module, nn.MultiheadAttention) and isinstance(base_op(module), (LinearOp, TransposedOp))


def all_linear(model: Any, leave_out: Iterable[str] = ()) -> set[str]:
    """What "all-linear" means in a model: every linear layer but the output embedding and those in `leave_out`."""
    head = held(embeddings_of(model, "output"))
    leave_out = set(leave_out)
    inside = {id(m) for _, a in model_modules(model) if isinstance(a, nn.MultiheadAttention) for m in a.children()}
    return {
        key
        for key, module in model_modules(model)
        if _is_linear(module) and module is not head and id(module) not in inside and not ends_with(key, leave_out)
    }


def shortened(targets: set[str], model: nn.Module, kept: set[str]) -> set[str]:
    """The shortest last parts of names that mean the same modules as `targets`, and those of `targets` in `kept`."""
    entries = {key: ends_with(key, targets) for key, _ in model_modules(model)}
    if not targets.issubset(entries.values()):  # what means nothing is to be named
        return targets
    taken = {tail for key, entry in entries.items() if entry is None for tail in _tails(key)}
    short = {next(tail for tail in _tails(key) if tail not in taken) for key, entry in entries.items() if entry}
    return short | (targets & kept)


def _tails(name: str) -> Iterator[str]:
    """The last part of a name, the last two parts, and so on."""
    start = len(name)
    while start > 0:
        start = name.rfind(".", 0, start)
        yield name[start + 1 :]


def state_dict_targets(state_dict: Iterable[str], prefix: str) -> set[str]:
    """Names of the modules that have tensors of a method in a state dict, also in one of a `PeftModel`."""
    keys = (plain_name(key.removeprefix(ROOT)) for key in state_dict)
    return {key.rpartition(f".{prefix}")[0] for key in keys if f".{prefix}" in key}
