"""Full-rank adaptation in a basis that layers share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.base_op import BaseOp
from peft.core.change import Add
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.slots import Dropout, FixedSlot, Slot
from peft.core.tuner import BaseTuner
from peft.ops.singular import Framed, common_basis, coordinates
from peft.ops.sparse import Entries, off_diagonal_positions
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeFloat, Share

_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


@dataclass
class FrodConfig(LayoutConfig, peft_type=PeftType.FROD):
    """FRoD: W' = U (S + diag(l)) V^T, a change of full rank with few values.

    Layers of a kind, those whose names end alike, share a basis V [in, in], which comes from all their weights (where
    several are in blocks of the same number, as in encoder and decoder, from that of the last): without the adapter,
    W = U diag(l) V^T with a U [out, in] of each layer, whose columns have length 1. l [in] is trained, and so are the
    entries of the sparse S [in, in], at random places off the diagonal that the layers share, too. For an embedding, W
    is its weight as it is held, one row for each vector.

    V and U take as much memory as the weights; V costs a QR decomposition of all weights of a kind, once, and U a
    system of equations for each layer, whenever the adapter is made or loaded.

    Args:
        projection_prng_key: seed of the places.
        save_projection: store V and the places in the checkpoint; without, they are made again from weights and seed,
            which gives the same with the same torch on a like processor alone.
        frod_dropout: probability of dropout on the adapter's input.
        init_weights: start S at zero, without effect; False starts it, and l, at random.
        sparse_rate: how many entries of S are trained, as a share of all: between 0 and 1; at least one is, unless the
            share is 0.
        regularization_alpha: added to the diagonals of what is inverted on the way to V.
        progressbar: show one while the bases are made.
        runtime_offload_base_weight: accepted for the sake of files; the base weight is part of the computation here, so
            it stays where it is.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: Fraction = 0.0
    init_weights: bool = True
    sparse_rate: Share = 0.01
    regularization_alpha: NonNegativeFloat = 0.001
    progressbar: bool = True
    runtime_offload_base_weight: bool = False


class FrodLayer(AdapterLayer):
    """A module whose weight is changed in the basis that its kind shares."""

    frod_lambda_l = Slot()
    frod_lambda_s_values = Slot()
    frod_U = FixedSlot(stored=False)
    #: l as it is without the adapter
    frod_start = FixedSlot(stored=False)
    frod_V = FixedSlot(shared=True, stored="save_projection")
    frod_s_indices = FixedSlot(shared=True, stored="save_projection")
    frod_s_size = FixedSlot(shared=True, stored="save_projection")

    frod_dropout = Dropout()

    def create(self, name: str, config: FrodConfig) -> None:
        self.find_coordinates(name)
        start = self.frod_start[name].clone()
        values = torch.zeros(self.shared_tensor("frod_s_indices", name).shape[1])
        if not config.init_weights:
            values.normal_(std=0.1)
            start += torch.randn_like(start) * 0.1
        self.frod_lambda_l[name], self.frod_lambda_s_values[name] = nn.Parameter(start), nn.Parameter(values)

    def draw(self, name: str, config: FrodConfig) -> None:
        if self.frod_U[name].is_meta:
            self.find_coordinates(name)

    def loaded(self, name: str) -> None:
        # The basis of the file may differ from the one that was here by signs, or in its last digits.
        dtype = self.frod_U[name].dtype
        self.find_coordinates(name)
        for held in (self.frod_U, self.frod_start):
            held[name] = held[name].to(dtype)

    def find_coordinates(self, name: str) -> None:
        """Works out U and the start of l."""
        weight, basis = self.start_matrix(), self.shared_tensor("frod_V", name)
        weight = weight.T if self.op.kind == "Embedding" else weight
        if basis.is_meta:
            weight = weight.to("meta")
        self.frod_U[name], self.frod_start[name] = coordinates(weight, basis.to(weight.device))

    def change(self, name: str) -> Add:
        diagonal, values = self.frod_lambda_l[name], self.frod_lambda_s_values[name]
        left, basis = self.frod_U[name].to(diagonal), self.shared_tensor("frod_V", name).to(diagonal)
        core = Entries.at(self.shared_tensor("frod_s_indices", name), values, (len(basis), len(basis)))
        moved = diagonal - self.frod_start[name].to(diagonal)
        matrix = Framed(left, core, moved, basis, transposed=self.op.kind == "Embedding")
        return Add(matrix, dropout=self.dropout_of(name))


class FrodMethod(Method):
    """What FRoD shares: for each kind of layer a basis, and the places of the sparse entries."""

    common_fields = ("projection_prng_key",)

    def plan_settings(self, plan: Plan, config: FrodConfig) -> dict[str, dict[str, Any]]:
        sizes: dict[str, int] = {}
        settings = {}
        for layer in plan.layers:
            kind, size = kind_of(layer.name), basis_size(layer.op)
            if sizes.setdefault(kind, size) != size:
                kind = f"{kind}_{size}"
            settings[layer.name] = {"groups": dict.fromkeys(_SHARED, kind)}
        return settings

    def share(self, plan: Plan, config: FrodConfig, adapter_name: str) -> dict[str, dict[str, Tensor]]:
        from tqdm import tqdm

        kinds: dict[str, dict[int, Any]] = {}
        for place, layer in enumerate(plan.layers):
            kind = self.planned[id(layer.base), layer.parameter_name]["groups"]["frod_V"]
            kinds.setdefault(kind, {})[number_of(layer.name, place)] = layer
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        shared: dict[str, dict[str, Tensor]] = {name: {} for name in _SHARED}
        hidden = not config.progressbar or plan.waits_for_file
        for kind in tqdm(sorted(kinds), desc="FRoD bases", disable=hidden):
            layers = [layer for _, layer in sorted(kinds[kind].items())]
            size = basis_size(layers[0].op)
            matrices = []
            for layer in layers:
                matrix = layer.start_matrix(plan.waits_for_file)
                matrices.append(matrix.T if layer.op.kind == "Embedding" else matrix)
            count = max(1, int(size * size * config.sparse_rate)) if config.sparse_rate else 0
            shared["frod_V"][kind] = common_basis(matrices, config.regularization_alpha)
            shared["frod_s_indices"][kind] = off_diagonal_positions(size, count, generator)
            shared["frod_s_size"][kind] = torch.tensor([size, size])
        return shared


def kind_of(key: str) -> str:
    """What layers with alike names are called together: the last two parts of the name, or one after a number."""
    if re.search(r"(^|\.)attention\.output\.dense$", key):
        return "attention_output"  # BERT's, which is not its `output.dense` of the feed-forward network
    *_, before, last = ("", *key.split("."))
    return last if not before or before.isdigit() else f"{before}_{last}"


def number_of(key: str, otherwise: int) -> int:
    """The number of the block a layer is in: of a kind, the last layer with a number takes part in the basis."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?=\.|$)", key) or re.search(r"(?:^|\.)(\d+)(?=\.|$)", key)
    return int(found[1]) if found else otherwise


def basis_size(op: BaseOp) -> int:
    """The number of columns of a weight, of rows for an embedding."""
    return op.out_features if op.kind == "Embedding" else op.in_features


class FrodModel(BaseTuner, layer=FrodLayer, method=FrodMethod, prefix="frod_"):
    """A model with FRoD adapters; `frod_V` holds the bases, one for each kind of an adapter's layers."""
