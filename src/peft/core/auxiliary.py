"""What is trained beside the adapters: whole modules, and single rows of an embedding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.core.base_op import base_op
from peft.core.call import current_route
from peft.core.change import Change, Rows, Weight
from peft.core.layer import AdapterLayer
from peft.core.part import Part, as_names
from peft.core.routing import BASE, Route, join_rows, select_rows
from peft.core.slots import Setting, Slot
from peft.errors import PeftWarning


class AuxiliaryTrainingWrapper(Part):
    """A module of the model with something trained in its place: one version of it per adapter."""

    # Attributes the wrapper lacks are those of the module it stands for.
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_modules" not in self.__dict__:
                raise
            return getattr(self.current_module(), name)

    @property
    def wrapped(self) -> nn.Module:
        return self.original_module

    def current_module(self) -> nn.Module:
        """The module that the next forward pass runs."""
        raise NotImplementedError

    def version(self, name: str) -> nn.Module:
        """The module with what adapter `name` trained; the original if the adapter has nothing here."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names as files have them -> names as the live module has them."""
        return self.key_map(adapter_name)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors, as files name them, out of this module's `state_dict`."""
        return {key: state_dict[live] for key, live in self.key_map(adapter_name).items() if live in state_dict}

    @property
    def merged_adapters(self) -> list[str]:
        return []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None) if kwargs else None
        route = current_route() if names is None else Route(names)
        if route is not None and not self._disable_adapters:
            return self._forward_routed(route, *args, **kwargs)
        return self.current_module()(*args, **kwargs)

    def _forward_routed(self, route: Route, *args: Any, **kwargs: Any) -> Any:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is None:
            raise ValueError("adapter_names (a mixed batch) needs modules whose inputs are tensors, a row per sample.")
        rows = first.shape[0]
        parts = []
        for name, index in route.groups(rows, first.device):
            some_args, some_kwargs = select_rows(index, rows, args, kwargs)
            parts.append((index, self.version(name)(*some_args, **some_kwargs)))
        return join_rows(parts, 0, rows)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module that each adapter trains in full: `modules_to_save[adapter]` beside `original_module`.

    Args:
        module_to_save: the module.
        adapter_name: the first adapter.
        tied_module: a module to share the copy's weight with (tied embeddings).
    """

    slots: ClassVar[dict[str, Slot]] = {"modules_to_save": Slot(modules=True)}

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None):
        super().__init__()
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict()
        module_to_save.requires_grad_(False)
        self.update(adapter_name, tied_module)

    def update(self, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        """Makes a copy of the original for another adapter."""
        copied = copy.deepcopy(self.original_module)
        copied.requires_grad_(False)
        if tied_module is not None:
            copied.weight = tied_module.weight
        # Hooks (of accelerate, say) belong to the original's place in the model.
        if hasattr(self.original_module, "_hf_hook"):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(copied, copy.copy(self.original_module._hf_hook))
        self.modules_to_save[adapter_name] = copied

    def check_active(self, names: Sequence[str]) -> None:
        here = [name for name in names if self.has(name)]
        if len(here) > 1:
            raise ValueError(
                f"Only one adapter at a time can have its own version of a module; {', '.join(here)} all have one."
            )

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes the version of this adapter the one that runs; the original where the adapter has none here.

        Raises:
            ValueError: several of the adapters have a version of this module.
        """
        super().set_adapter([name for name in as_names(adapter_names) if self.has(name)], inference_mode)

    def version(self, name: str) -> nn.Module:
        return self.modules_to_save[name] if name != BASE and self.has(name) else self.original_module

    def current_module(self) -> nn.Module:
        return (
            self.original_module
            if self._disable_adapters or not self._active
            else self.modules_to_save[self._active[0]]
        )

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [parameter for parameter in super().adapter_parameters(name) if parameter.is_floating_point()]

    @property
    def weight(self) -> Any:
        """The weight of the module that runs, as models with tied embeddings ask for it."""
        return self.current_module().weight

    def key_map(self, name: str) -> dict[str, str]:
        if not self.has(name):
            return {}
        return {leaf: f"modules_to_save.{name}.{leaf}" for leaf in self.modules_to_save[name].state_dict()}

    def unload(self, merge: bool, adapter_names: Sequence[str] | None = None) -> nn.Module:
        if not merge or not self._active:
            return self.original_module
        active = self._active[0]
        others = [name for name in adapter_names or () if name != active and self.has(name)]
        if others:
            warnings.warn(
                f"{', '.join(others)} trained a version of {type(self.original_module).__name__} too, but the"
                " active adapter's"
                f" ({active!r}) is the one that stays; call set_adapter first to have another.",
                PeftWarning,
                stacklevel=3,
            )
        return self.modules_to_save[active].requires_grad_(True)


class TrainableTokensLayer(AdapterLayer):
    """Rows of an embedding that are trained on their own: `trainable_tokens_delta[adapter]`, [tokens, dim].

    Args:
        base_layer: an `nn.Embedding`, or the linear layer tied to one.
        tied: the layer whose rows these are too (an output layer shares those of the embedding).
    """

    slots: ClassVar[dict[str, Slot]] = {"trainable_tokens_delta": Slot()}
    kinds = frozenset(("Embedding", "Linear"))
    label = ""

    trainable_tokens_delta: nn.ParameterDict
    token_indices = Setting[list[int]]()

    def __init__(self, base_layer: nn.Module, tied: TrainableTokensLayer | None = None):
        super().__init__(base_layer)
        self._is_tied = False
        #: whether the rows are those of another layer too
        self.has_twin = False
        #: whether files hold its rows too: not where they are known to be the embedding's
        self._is_stored = tied is None
        if tied is not None:
            self.tie_to(tied)

    def tie_to(self, tied: TrainableTokensLayer) -> None:
        """Takes the rows of another layer for this one's too."""
        # The same containers: what is trained, moved or deleted there is so here.
        self.trainable_tokens_delta = tied.trainable_tokens_delta
        self.records = tied.records
        self._is_tied = self.has_twin = tied.has_twin = True
        if self.get_base_layer().weight is tied.get_base_layer().weight:
            self.ledger = tied.ledger
        self.refresh()

    def new_record(self, name: str, config: Any) -> None:
        if not self._is_tied:
            super().new_record(name, config)

    def create(self, name: str, config: Any, token_indices: Sequence[int] = ()) -> None:
        if self._is_tied:
            return
        weight = self.get_base_weight()
        outside = [index for index in token_indices if not -weight.shape[0] <= index < weight.shape[0]]
        if outside:
            raise IndexError(f"Token index {outside[0]} is out of range for an embedding of {weight.shape[0]} tokens.")
        self.token_indices[name] = list(token_indices)
        rows = weight.detach()[torch.tensor(token_indices, dtype=torch.long, device=weight.device)]
        start = rows.clone() if getattr(config, "init_weights", True) else torch.randn_like(rows)
        self.trainable_tokens_delta[name] = nn.Parameter(start)

    def key_map(self, name: str) -> dict[str, str]:
        return super().key_map(name) if self._is_stored else {}

    def change(self, name: str) -> Change:
        tokens = self.in_features if self.op.kind == "Embedding" else self.out_features
        rows = self.trainable_tokens_delta[name]
        index = torch.tensor([i % tokens for i in self.token_indices[name]], dtype=torch.long, device=rows.device)
        # An embedding that shortens the vectors it looks up (max_norm) has to do so itself.
        by_weight = getattr(self.get_base_layer(), "max_norm", None) is not None
        change = Rows(index, rows)
        return Weight(lambda matrix: change.weight(self.op, None, matrix)) if by_weight else change

    def names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        names = super().names_to_merge(adapter_names)
        seen = {index for name in self.merged_adapters for index in self.token_indices[name]}
        for name in names:
            shared = seen.intersection(self.token_indices[name])
            if shared:
                raise ValueError(
                    f"The token indices {sorted(shared)} are trained by several of"
                    f" {', '.join([*self.merged_adapters, *names])}; they cannot all be merged."
                )
            seen.update(self.token_indices[name])
        return names

    @property
    def type_name(self) -> str:
        return type(self).__name__


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding of which an adapter trains some rows beside its other changes: `token_adapter` around it.

    Args:
        module_to_save: the embedding, or the output layer tied to it.
        adapter_name: the first adapter.
        token_indices: the rows it trains.
        tied_adapter: the token adapter of the embedding that this module is tied to.
    """

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: Sequence[int],
        tied_adapter: TrainableTokensLayer | None = None,
    ):
        super().__init__()
        op = base_op(module_to_save)
        if op is None or op.kind not in TrainableTokensLayer.kinds:
            raise TypeError(f"trainable_token_indices needs an embedding, got {type(module_to_save).__name__}.")
        self.token_adapter = TrainableTokensLayer(module_to_save, tied_adapter)
        self.update(adapter_name, token_indices=token_indices)

    @property
    def original_module(self) -> nn.Module:
        """The embedding itself."""
        return self.token_adapter.base_layer

    def update(self, adapter_name: str, token_indices: Sequence[int] = ()) -> None:
        """Adds the rows of another adapter."""
        self.token_adapter.add_adapter(adapter_name, None, token_indices=token_indices)

    def has(self, name: str) -> bool:
        return self.token_adapter.has(name)

    def adapter_names(self) -> list[str]:
        return self.token_adapter.adapter_names()

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.token_adapter.adapter_parameters(name))

    def current_module(self) -> nn.Module:
        return self.token_adapter

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        self.token_adapter.set_adapter(adapter_names, inference_mode)
        self._active = self.token_adapter.active_adapters

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.token_adapter.set_requires_grad(adapter_names, requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        self.token_adapter.enable_adapters(enabled)
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        self.token_adapter.delete_adapter(adapter_name)
        self._active = self.token_adapter.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        return self.token_adapter.merged_adapters

    @property
    def weight(self) -> Tensor:
        """The embedding with the trained rows in it, as models with tied embeddings ask for it."""
        return self.token_adapter.effective()[0]

    def key_map(self, name: str) -> dict[str, str]:
        return {
            f"token_adapter.{key}": f"token_adapter.{live}" for key, live in self.token_adapter.key_map(name).items()
        }

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(x, *args, **kwargs)


def save_modules(model: nn.Module, keys: Sequence[str], adapter_name: str, tied: Sequence[str] = ()) -> None:
    """Gives an adapter its own copy of modules of a model, to be trained in full; those in `tied` share a weight."""
    shared: nn.Module | None = None
    for key in keys:
        parent, _, name = key.rpartition(".")
        owner = model.get_submodule(parent)
        module = getattr(owner, name)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name, shared if key in tied else None)
        else:
            wrapper = ModulesToSaveWrapper(module, adapter_name, shared if key in tied else None)
            module = wrapper.train(module.training)
            setattr(owner, name, module)
        if key in tied:
            shared = shared or module.modules_to_save[adapter_name]


def unsave_modules(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter's copies out again; modules that no other adapter trains are put back."""
    for key, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            module.delete_adapter(adapter_name)
            if not module.modules_to_save:
                parent, _, name = key.rpartition(".")
                setattr(model.get_submodule(parent), name, module.original_module)
