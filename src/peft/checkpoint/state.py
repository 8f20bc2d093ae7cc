"""An adapter's tensors in and out of a model, by the names that files have for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft.checkpoint.gather import Location, prompt_tensors, unaliased, values_of, without_holders
from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.biases import stored_biases
from peft.core.layer import AdapterLayer
from peft.core.model_config import embeddings_of
from peft.core.storage.sharded import reshard
from peft.core.storage.shared import put, shape_of
from peft.core.tuner import BaseTuner
from peft.core.undo import is_adding
from peft.core.walk import in_files, layers_of, live_modules, parts_of
from peft.core.whole import contents_kept
from peft.core.wrappers import held, layer_of, unwrapped
from peft.errors import listed, warn
from peft.hub import fetch
from peft.registry import method_of
from peft.tuners.prompts.base import PromptHost
from peft.untrusted import read_json

#: last parts of the names of embeddings and output layers
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")


class IncompatibleKeys(NamedTuple):
    """What did not fit in loading: the adapter's names without a value, and names that only the file has."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def locations_of(model: nn.Module, adapter_name: str) -> dict[str, Location]:
    """Where the tensors of an adapter live, by the names that files have for them."""
    locations: dict[str, Location] = {}
    has_tuner = False
    for path, module in live_modules(model):
        has_tuner = has_tuner or isinstance(module, BaseTuner)
        if not isinstance(module, (AdapterLayer, ModulesToSaveWrapper, BaseTuner)):
            continue
        prefix = f"{path}." if path else ""
        layer = next(module.adapter_layers(), None) if isinstance(module, BaseTuner) else module
        device = layer.place()[0] if isinstance(layer, AdapterLayer) else None
        keys = {prefix + key: live for key, live in module.key_map(adapter_name).items()}
        if isinstance(module, AdapterLayer) and not has_tuner:  # which would hold what layers share: once, without path
            keys |= module.shared_key_map(adapter_name)
        for key, live in keys.items():
            owner_path, _, attribute = live.rpartition(".")
            owner = module.get_submodule(owner_path) if owner_path else module
            name = in_files(model, adapter_name, key)
            locations.setdefault(name, Location(prefix + live, owner, attribute, device))
    return locations


def config_of(model: nn.Module, adapter_name: str) -> Any:
    """The configuration of an adapter on a model.

    Raises:
        KeyError: there is no such adapter.
    """
    configs = getattr(model, "peft_config", None) or {}
    if not configs:  # so of a base model that was taken out of its wrapper; layers know theirs as well
        for _, part in parts_of(model):
            configs = {**configs, **part.configs}
    if adapter_name not in configs:
        raise KeyError(f"Adapter {adapter_name!r} not found; there are {', '.join(configs) or 'none'}.")
    return configs[adapter_name]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors by the names that files have for them.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: the model's state dict, where it has to be gathered from several processes; None reads the model.
        adapter_name: which adapter.
        unwrap_compiled: look inside the wrapper of `torch.compile`.
        save_embedding_layers: take the base model's embeddings along; `"auto"` does so where the adapter targets them
            or the vocabulary has another size than that of the model it is named after.

    Raises:
        KeyError: there is no such adapter, or `state_dict` lacks a tensor of it.
        ValueError, RuntimeError: a tensor is not whole.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = config_of(model, adapter_name)
    locations = locations_of(model, adapter_name)
    locations.update(_bias_locations(model, adapter_name, copies=getattr(config, "bias", "none") == "all"))
    tensors: dict[str, Tensor] = {}
    if config.is_prompt_learning and isinstance(model, PromptHost):
        tensors = prompt_tensors(model, adapter_name, state_dict)
    locations.update(_embeddings_to_save(model, adapter_name, save_embedding_layers))
    tensors |= values_of(model, locations, state_dict)
    method = getattr(method_of(config.peft_type).model_class, "method_class", None)
    return unaliased(tensors if method is None else method.write_tensors(model, adapter_name, tensors))


def _bias_locations(model: nn.Module, adapter_name: str, copies: bool = False) -> dict[str, Location]:
    """The biases of the base model that an adapter has trained; with `copies`, see `stored_biases`."""
    biases = stored_biases(model, adapter_name, copies)
    return {
        in_files(model, adapter_name, key): Location(live, owner, name, None, kept)
        for key, live, owner, name, kept in biases
    }


def _embeddings_to_save(model: nn.Module, adapter_name: str, choice: bool | str) -> dict[str, Location]:
    """The base weights of embeddings that are saved along: if not chosen, those that the adapter names and is on."""
    if not choice:
        return {}
    config = config_of(model, adapter_name)
    targets = getattr(config, "target_modules", None) or ()  # a list, or an expression with the name in it
    stores = config.stores_embeddings and getattr(config, "trainable_token_indices", None) is None
    named = choice == "auto" and stores and any(name in targets for name in EMBEDDING_LAYER_NAMES)
    changed = vocabulary_changed(model, config)
    if choice == "auto" and not named and not changed:
        return {}
    plain, adapted = _embedding_locations(model, adapter_name)
    if choice is True and not plain and not adapted:
        warn("save_embedding_layers=True has no effect: the model does not say which its embeddings are.")
    if named and adapted:
        warn(
            "The adapter targets embedding layers, so their base weights are saved along (save_embedding_layers=True)."
        )
    return adapted if (named or adapted) and not changed else plain | adapted


def vocabulary_changed(model: nn.Module, config: Any) -> bool:
    """Whether the model's vocabulary has another size than that of the model it is named after, if that can be told."""
    name, now = config.base_model_name_or_path, getattr(getattr(model, "config", None), "vocab_size", None)
    if not name or now is None:
        return False
    try:
        path = fetch(name, "config.json")
        before = None if path is None else read_json(path).get("vocab_size")
    except Exception:  # whatever lies there is somebody else's, and saving goes on without it
        return False
    return isinstance(before, int) and before != now


def _embedding_locations(model: nn.Module, adapter_name: str) -> tuple[dict[str, Location], dict[str, Location]]:
    """The base weights of the embedding and the output layer: of those that the adapter leaves, or trains rows of, and
    of those that it is on.
    """
    locations: dict[str, Location] = {}
    adapted: dict[str, Location] = {}
    for side in ("input", "output"):
        layer: Any = embeddings_of(model, side)
        layer = None if layer is None else layer_of(layer)
        path = next((path for path, module in live_modules(model) if module is layer), None)
        kept, found = {}, locations
        if isinstance(layer, ModulesToSaveWrapper) and not layer.has(adapter_name):
            path, layer = f"{path}.original_module", held(layer)
        if path is None or isinstance(layer, ModulesToSaveWrapper):  # which is trained, and saved in full already
            continue
        while isinstance(layer, AdapterLayer):
            found = adapted if layer.has(adapter_name) and not layer.is_beside(adapter_name) else found
            path, kept, layer = f"{path}.base_layer", layer.ledger.originals, layer.base_layer
        for name, _ in layer.named_parameters(recurse=False):
            live = f"{path}.{name}"
            found[in_files(model, adapter_name, live)] = Location(live, layer, name, None, kept)
    return locations, adapted


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Puts an adapter's tensors, named as in a file, into a model. All are checked before the first is copied.

    Args:
        model: a `PeftModel`, or a model with injected adapters; the adapter exists already.
        peft_model_state_dict: the tensors.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out tensors of another shape, with a warning, rather than raise.
        low_cpu_mem_usage: take the tensors themselves where the model's are on the meta device.

    Returns:
        Names of this adapter that got no value, and names that the model has no place for.

    Raises:
        KeyError: there is no such adapter.
        RuntimeError: shapes differ.
    """
    config = config_of(model, adapter_name)
    method = getattr(method_of(config.peft_type).model_class, "method_class", None)
    with contents_kept(model, adapter_name, values=not is_adding()):
        if method is not None:
            peft_model_state_dict = method.read_tensors(model, adapter_name, peft_model_state_dict)
        fit = Fit(model, config, adapter_name, peft_model_state_dict)
        _check(fit, ignore_mismatched_sizes)
        reshard()
        base = [at.tensor for key, _, at in fit.found if at is not None and key not in fit.locations]
        with torch.no_grad(), contents_kept(model, adapter_name, base, values=False):
            for key, value, location in fit.found:
                if location is None:
                    model.prompt_encoder[adapter_name].load_stored({key: value})  # type: ignore[union-attr,index]
                elif location.tensor.is_meta:
                    _assign(location, value)
                else:
                    put(location.tensor, value)
            for layer in layers_of(model, AdapterLayer, adapter_name).values():
                layer.loaded(adapter_name)
    return IncompatibleKeys(fit.missing(), fit.unexpected)


def _check(fit: Fit, ignore_mismatched_sizes: bool) -> None:
    bad = [key for key, value, _ in fit.found if not _is_finite(value)]
    if bad:
        warn(f"Adapter {fit.adapter_name!r}: values that are not finite (NaN or Inf) are in {listed(bad)}.")
    wrong = list(fit.wrong.values())
    if wrong and not ignore_mismatched_sizes:
        lines = "\n  ".join(wrong[:20]) + (f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise RuntimeError(f"size mismatch for {len(wrong)} tensors of adapter {fit.adapter_name!r}:\n  {lines}")
    if wrong:
        warn(f"Left out for their size: {'; '.join(wrong)}.")


class Fit:
    """What of an adapter's tensors has which place in a model.

    Of the base model's tensors, a file may bring those that the configuration accounts for: biases that are trained,
    and the embeddings, which are saved along where they have adapters or the vocabulary has grown.

    Attributes:
        given: the tensors by the names that files have for them.
        found: names, tensors and places (None for those of a prompt) of what fits.
        wrong: names of what is of another size -> which.
        unexpected: names of what has no place.
    """

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, tensors: Mapping[str, Tensor]):
        self._model, self.adapter_name, self.locations = model, adapter_name, locations_of(model, adapter_name)
        self.prompt: dict[str, Tensor] = {}
        if config.is_prompt_learning and isinstance(model, PromptHost):
            self.prompt = model.prompt_encoder[adapter_name].stored_tensors()  # type: ignore[operator]
        plain, adapted = _embedding_locations(model, adapter_name)
        self._embeddings = {_place(location) for location in plain.values()}
        self._accounted = {_place(location): location for location in adapted.values()}
        for key, location in _bias_locations(model, adapter_name).items():
            self._accounted[_place(base_location(model, key) or location)] = location
        self.found: list[tuple[str, Tensor, Location | None]] = []
        self.wrong: dict[str, str] = {}
        self.unexpected: list[str] = []
        self._refused: list[str] = []
        self._replaced: list[str] = []
        raw = self._raw_names(tensors)
        self.given = {self._file_key(raw.get(key, key)): value for key, value in tensors.items()}
        for key, value in self.given.items():
            self._put(key, value)
        self._warn()

    def _put(self, key: str, value: Tensor) -> None:
        location = self.locations.get(key) or (None if key in self.prompt else self._of_base(key, value))
        if location is None and key not in self.prompt:
            self.unexpected.append(key)
            return
        target = self.prompt[key] if location is None else location.tensor
        if shape_of(target) != value.shape:
            self.wrong[key] = f"{key}: the file has {tuple(value.shape)}, the model {tuple(shape_of(target))}"
            return
        _check_kind(key, value, target)
        self.found.append((key, value, location))

    def missing(self) -> list[str]:
        """Names of the adapter's tensors that got no value."""
        given = {key for key, _, _ in self.found} | self.wrong.keys()
        # A tensor that several layers hold may be in the file once.
        filled = {_place(location) for _, _, location in self.found if location is not None}
        left = {key: at for key, at in self.locations.items() if key not in given and _place(at) not in filled}
        names = [location.live_name for location in left.values()]
        return names + [f"prompt_encoder.{self.adapter_name}.{key}" for key in self.prompt if key not in given]

    def _raw_names(self, keys: Iterable[str]) -> dict[str, str]:
        """The names that a model's own state dict has, with an adapter's name in them -> those that files have."""
        others = [key for key in keys if key not in self.locations]
        live = {name: without_holders(location.live_name) for name, location in self.locations.items() if others}
        cuts = ((name, cut) for name, plain in live.items() for cut in _cuts(plain))
        by_rest = {(before, after): name for name, (before, part, after) in cuts if part == self.adapter_name}
        raw: dict[str, dict[str, str]] = {}
        for key in others:
            for before, part, after in _cuts(without_holders(key)):
                if (before, after) in by_rest:
                    raw.setdefault(part, {})[key] = by_rest[before, after]
        # Of several adapters in the file, the one of that name; else "default"; else the only one.
        names = [name for name in (self.adapter_name, "default") if name in raw] or (list(raw) if len(raw) == 1 else [])
        return raw[names[0]] if names else {}

    def _file_key(self, key: str) -> str:
        """The name that a file has for the tensor that is called `key`."""
        if not isinstance(self._model, PromptHost):
            key = key.removeprefix("base_model.model.")  # a file of a PeftModel, for injected adapters
        others = (
            key.replace(".base_layer", ""),  # a module trained in full that other adapters were on before
            key.removeprefix("base_model."),  # what layers share: a file of a PeftModel, for injected adapters
            key.replace("base_model.model.", "base_model.", 1),  # the other way round
        )
        return next((name for name in (key, *others) if name in self.locations), key)

    def _of_base(self, key: str, value: Tensor) -> Location | None:
        """The place in the base model, where the configuration accounts for the tensor."""
        location = base_location(self._model, key)
        if location is None:
            return None
        known = self._accounted.get(_place(location))
        if known or (key.endswith("bias") and same(location.tensor, value)):
            return known or location
        if _place(location) in self._embeddings:
            if not same(location.tensor, value):
                self._replaced.append(key)
            return location
        self._refused.append(key)
        return None

    def _warn(self) -> None:
        """Names what was refused, and what was taken and may surprise."""
        if self._refused:
            warn(
                f"Refused: the file has weights of the base model that the adapter's configuration does not account"
                f" for: {listed(self._refused)}. Modules that are trained in full stand in modules_to_save."
            )
        if self._replaced:
            warn(
                f"The file replaces embeddings of the base model, {listed(self._replaced)}, as a save with"
                " save_embedding_layers=True makes it; unloading or deleting the adapter does not bring the old back."
            )


def same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and values."""
    return tensor.shape == other.shape and torch.equal(tensor, other.to(tensor))


def _cuts(name: str) -> Iterator[tuple[str, str, str]]:
    """Every part of a dotted name, with what is before and after it."""
    parts = name.split(".")
    return ((".".join(parts[:i]), part, ".".join(parts[i + 1 :])) for i, part in enumerate(parts))


def _place(location: Location) -> tuple[int, str]:
    return id(location.owner), location.attribute


def _check_kind(key: str, value: Any, target: Tensor) -> None:
    """Raises ValueError where values cannot be what they are to replace."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{key} in the file is no plain tensor but a {type(value).__name__}.")
    kinds = [(t.is_complex(), t.is_floating_point()) for t in (value, target)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{key} is {value.dtype} in the file, and {target.dtype} in the model.")


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return True
    value = value if value.dtype.itemsize > 1 else value.float()
    # A sum is one pass without a second tensor; it may overflow where no entry does.
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def base_location(model: nn.Module, key: str) -> Location | None:
    """The place of a tensor of the base model (an embedding, a bias) that a file has along with the adapter."""
    path, _, name = key.rpartition(".")
    for place in (path, f"{path}.base_layer", f"{path}.original_module"):
        with suppress(AttributeError):
            owner = unwrapped(model.get_submodule(place))
            if owner._parameters.get(name) is not None:
                return Location(f"{place}.{name}", owner, name)
    return None


def _assign(location: Location, value: Tensor) -> None:
    """Replaces a tensor without memory by `value`, in its dtype."""
    owner, attribute = location.owner, location.attribute
    if attribute not in owner._parameters and attribute not in owner._buffers:
        return  # a view of a tensor that it is tied to, and which the file has too
    old = location.tensor
    # A copy: the tensor may be a window on a file that somebody else writes to.
    device = value.device if location.device is None else location.device
    value = value.to(device=device, dtype=old.dtype, copy=True)
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        owner._buffers[attribute] = value
