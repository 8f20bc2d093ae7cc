"""The values of an adapter's tensors, whole, wherever and in whatever parts they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft.core.storage.flat import check_uncut
from peft.core.storage.shared import rebuilt, shape_of, whole
from peft.core.wrappers import plain_name, state_names
from peft.tuners.prompts.base import PromptHost


class Location(NamedTuple):
    """Where one tensor of an adapter lives in a model."""

    live_name: str
    owner: nn.Module
    attribute: str
    device: torch.device | None = None  # where it belongs, if it has no memory yet
    originals: Mapping[str, Any] = {}  # those of the owner's tensors that adapters are merged into

    @property
    def tensor(self) -> Tensor:
        kept = self.originals.get(self.attribute)
        return kept if isinstance(kept, Tensor) else getattr(self.owner, self.attribute)


def values_of(
    model: nn.Module, locations: Mapping[str, Location], state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors in these places: out of `state_dict`, which asks no other process, or read by all processes together.

    Raises:
        KeyError: `state_dict` lacks one.
        ValueError: one there has no values.
        RuntimeError: FSDP1 has cut them up, and nobody has put them together.
    """
    if state_dict is not None:
        return _given(locations, state_dict)
    check_uncut(
        model,
        {location.live_name: location.tensor for location in locations.values()},
        "either give the whole, state_dict=, from model.state_dict() of the wrapped model, called on all processes"
        " under StateDictType.FULL_STATE_DICT (`accelerator.get_state_dict(model)`); or ",
    )
    with torch.no_grad():
        return {key: whole(location.tensor).detach() for key, location in locations.items()}


def without_holders(name: str) -> str:
    """The name of a tensor in a model's state dict, without those of modules that only hold others."""
    return plain_name(name).replace(".token_adapter.", ".")


def _given(locations: Mapping[str, Location], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {without_holders(name): value for name, value in state_dict.items()}
    names = [location.live_name for location in locations.values()]
    missing = [name for name in names if without_holders(name) not in given]
    if missing:
        raise KeyError(
            f"state_dict has no {missing[0]!r}"
            + (f" (nor {len(missing) - 1} more of the adapter's tensors)" if missing[1:] else "")
            + f"; it has {len(given)} entries. It has to be that of the whole PeftModel; FSDP may give it to the first"
            " process only, which then has to be the one that saves."
        )
    values = {key: whole(given[without_holders(location.live_name)]) for key, location in locations.items()}
    for key, location in locations.items():
        found, wanted = values[key].shape, shape_of(location.tensor)
        if (not found.numel() and wanted.numel()) or (hasattr(location.tensor, "ds_id") and found != wanted):
            raise ValueError(
                f"state_dict has {location.live_name!r} with shape {tuple(found)}, a part of it. DeepSpeed ZeRO-3 gives"
                " whole tensors where it gathers them (`accelerator.get_state_dict(model)`, with"
                " stage3_gather_16bit_weights_on_model_save); or leave state_dict out, and call save_pretrained on all"
                " processes."
            )
    return values


def unaliased(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own, as `safetensors.torch.save_file` wants them."""
    seen: set[Any] = set()
    for key, tensor in tensors.items():
        if not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            memory = (tensor.device, tensor.untyped_storage().data_ptr())
            if memory in seen and tensor.numel():
                tensors[key] = tensor.clone()
            seen.add(memory)
    return tensors


def prompt_tensors(model: PromptHost, adapter_name: str, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A soft prompt as a file stores it; what it is made of may lie in parts."""
    encoder: Any = model.prompt_encoder[adapter_name]
    locations = {}
    for name in state_names(encoder):
        path, _, attribute = name.rpartition(".")
        locations[name] = Location(f"prompt_encoder.{adapter_name}.{name}", encoder.get_submodule(path), attribute)
    values = values_of(model, locations, state_dict)
    encoder = rebuilt(encoder, values)
    return {**encoder.stored_tensors(), "prompt_embeddings": encoder.rows_to_save()}
