"""Biases of the base model that adapters train (`bias` in their configuration), beside the base model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peft.core import merge as merging
from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.layer import AdapterLayer
from peft.core.part import Part, as_names
from peft.core.storage.sharded import is_dtensor, is_managed
from peft.core.storage.shared import whole
from peft.core.walk import live_modules, parts_of

#: what a module calls the biases that are kept for it
_CHILD = "trained_biases"


class TrainedBiases(Part):
    """The biases of one module: its own, and those that each adapter has in their place.

    Those in effect are in the module itself under their usual names; the others wait here, where neither `parameters()`
    nor `state_dict()` sees them. A child of the module, so that it goes where that goes.
    """

    module: nn.Module
    #: the layer around the module, which may have merged something into a bias
    around: AdapterLayer | None
    _own: nn.ParameterDict
    _by_adapter: dict[str, nn.ParameterDict]
    _present: nn.ParameterDict

    def __init__(self, module: nn.Module, names: Iterable[str]):
        super().__init__()
        own = nn.ParameterDict({name: module._parameters[name] for name in names})
        self.__dict__.update(module=module, around=None, _own=own, _by_adapter={}, _present=own)

    def containers(self) -> list[Any]:
        return [self._by_adapter]

    def add(self, adapter_name: str, biases: dict[str, nn.Parameter]) -> None:
        """Takes in an adapter's biases."""
        self._by_adapter[adapter_name] = nn.ParameterDict(biases)

    def of(self, adapter_name: str | None) -> nn.ParameterDict:
        """An adapter's biases by name, in effect or not; the module's own for None."""
        for name in self._present:  # in the module it may be another parameter by now
            self._present[name] = self.module._parameters[name]
        return self._own if adapter_name is None else self._by_adapter[adapter_name]

    def originals(self, adapter_name: str) -> Mapping[str, Any]:
        """An adapter's biases, by name, as they were before adapters were merged into them; those alone."""
        merged = self.around is not None and self._present is self._by_adapter[adapter_name]
        return self.around.ledger.originals if merged else {}  # type: ignore[union-attr]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self._by_adapter[name].values()) if self.has(name) else []

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        super().set_adapter([name for name in as_names(adapter_names) if self.has(name)], inference_mode)

    def refresh(self) -> None:
        self._put(None if self._disable_adapters or not self._active else self._active[0])

    def _put(self, adapter_name: str | None) -> None:
        """Puts an adapter's biases into the module; its own ones for None."""
        wanted = self.of(adapter_name)
        if wanted is self._present:
            return
        if is_managed(self.module):
            raise NotImplementedError(
                f"fully_shard holds the biases of this {type(self.module).__name__}, so no others can take their place."
                " Switch adapters before fully_shard, or train no biases (bias='none')."
            )
        entries = self.around.ledger.entries if self.around is not None else []
        if self.around is not None and entries:
            merging.rewrite(self.around, [])
        for name, own in self.of(None).items():
            self.module._parameters[name] = wanted.get(name, own)
        self.__dict__["_present"] = wanted
        if self.around is not None and entries:
            merging.rewrite(self.around, entries)

    def unload(self, merge: bool, adapter_names: Sequence[str] | None = None) -> None:
        names = self._active if adapter_names is None else as_names(adapter_names)
        self.__dict__.update(_active=[name for name in names if merge and self.has(name)], _disable_adapters=False)
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedBiases:
        for held in (self._own, *self._by_adapter.values()):
            if held is not self._present:  # what is in the module moves with it
                held._apply(fn)
        return self


@contextmanager
def own_biases(parts: Iterable[tuple[str, Part]]) -> Iterator[None]:
    """While it lasts, modules have their own biases: a new adapter is made of the base model."""
    biases = [part for _, part in parts if isinstance(part, TrainedBiases)]
    for part in biases:
        part._put(None)
    try:
        yield
    finally:
        for part in biases:
            part.refresh()


def check_mixture(parts: Sequence[tuple[str, Part]], adapters: set[str]) -> None:
    """Raises ValueError where adapters, the active ones counted in, cannot be in one batch: merged or biased ones."""
    if any(part.merged_adapters for _, part in parts):
        raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")
    biased = {name for _, part in parts if isinstance(part, TrainedBiases) for name in part.adapter_names()} & adapters
    if biased and len(adapters) > 1:
        raise ValueError(
            f"Adapter {', '.join(sorted(biased))} trains biases of the base model, which cannot differ from sample to"
            " sample (adapter_names)."
        )


def train_biases(
    parts: Iterable[tuple[str, Part]], model: nn.Module, adapter_name: str, layer_class: type[AdapterLayer] | None
) -> None:
    """Gives an adapter biases of its own, which start as those of the base model.

    Args:
        parts: the parts of the model by name.
        model: the base model.
        adapter_name: the adapter.
        layer_class: on the layers of this class only; None for all modules that no adapter trains in full.
    """
    layers = [part for _, part in parts if isinstance(part, AdapterLayer)]
    copied: dict[int, nn.Parameter] = {}
    for module, names in _modules_with_biases(layers, model, adapter_name, layer_class):
        if is_managed(module) or any(is_dtensor(module._parameters[name]) for name in names):
            raise ValueError(
                f"Biases of a {type(module).__name__} that adapter {adapter_name!r} is to train are shared out already:"
                " put the adapter on before fully_shard, or train no biases (bias='none')."
            )
        biases = module._modules.get(_CHILD)
        if not isinstance(biases, TrainedBiases):
            biases = module._modules[_CHILD] = TrainedBiases(module, names)
        own = biases.of(None)
        for name in names:  # tied biases stay tied
            if id(own[name]) not in copied:
                copied[id(own[name])] = nn.Parameter(whole(own[name]).detach().clone(), requires_grad=False)
        biases.add(adapter_name, {name: copied[id(own[name])] for name in names})


def note_layers(parts: Sequence[tuple[str, Part]]) -> None:
    """Lets trained biases know the layers around their modules."""
    biases = {id(part.module): part for _, part in parts if isinstance(part, TrainedBiases)}
    for _, layer in parts if biases else ():
        if isinstance(layer, AdapterLayer) and id(layer.get_base_layer()) in biases:
            biases[id(layer.get_base_layer())].__dict__["around"] = layer


def _modules_with_biases(
    layers: Sequence[AdapterLayer], model: nn.Module, adapter_name: str, layer_class: type[AdapterLayer] | None
) -> list[tuple[Any, list[str]]]:
    if layer_class is not None:
        mine = [layer for layer in layers if isinstance(layer, layer_class) and layer.has(adapter_name)]
        found = [(layer.get_base_layer(), layer.op.bias_name or "bias") for layer in mine]
        return [(module, [name]) for module, name in found if module._parameters.get(name) is not None]
    modules = [module for _, module in live_modules(model, copies=False)]
    in_full = {id(m) for w in modules if isinstance(w, ModulesToSaveWrapper) for m in w.original_module.modules()}
    biases = {m: [n for n, p in m._parameters.items() if p is not None and n.endswith("bias")] for m in modules}
    return [(module, names) for module, names in biases.items() if names and id(module) not in in_full]


def stored_biases(
    model: nn.Module, adapter_name: str, copies: bool
) -> Iterator[tuple[str, str, nn.Module, str, Mapping[str, Any]]]:
    """The biases of an adapter: the name in files, the name in the model, what holds it, its name there, and originals.

    Args:
        model: the model.
        adapter_name: the adapter.
        copies: those of modules trained in full, and of their originals, too, which files of `bias="all"` have once
            more under these names.
    """
    for path, part in parts_of(model):
        if isinstance(part, TrainedBiases) and part.has(adapter_name):
            for name in part.of(adapter_name):
                live = f"{path.rpartition('.')[0]}.{name}"
                yield live, live, part.of(adapter_name), name, part.originals(adapter_name)
        elif isinstance(part, ModulesToSaveWrapper) and copies and part.has(adapter_name):
            # Below the first level, files have the adapter's name too.
            for held, inner in (("modules_to_save", f"modules_to_save.{adapter_name}"), ("original_module",) * 2):
                for place, owner in part.get_submodule(inner).named_modules():
                    for name in (name for name, _ in owner.named_parameters(recurse=False) if name.endswith("bias")):
                        tail = f".{place}.{name}" if place else f".{name}"
                        yield f"{path}.{inner if place else held}{tail}", f"{path}.{inner}{tail}", owner, name, {}
