"""How much of a known change of a linear layer each method finds: the same size of change, some 512 trained values."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from atlas_rows import Row, add, interval
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import peft
from peft.config import LayerConfig
from peft.registry import METHODS

WIDTH = 64
#: length of the change, relative to that of the weight
SHARE = 0.5
#: trained values that each method gets where its structure allows
VALUES = 512
#: not for a linear layer alone: norms, rows of an embedding, whole blocks, tasks, adapters that are there
OTHERS = ("LN_TUNING", "TRAINABLE_TOKENS", "SHADOW", "POLY", "XLORA")
#: the setting that says how many values there are, and what is tried for it; the rank elsewhere
WHOLE = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
SIZES: dict[str, tuple[str, Sequence[Any]]] = {
    "ADALORA": ("init_r", WHOLE),
    "ADAMSS": ("subspace_rank", WHOLE),
    "BOFT": ("boft_block_size", WHOLE),
    "C3A": ("block_size", WHOLE),
    "FOURIERFT": ("n_frequency", (VALUES,)),
    "FROD": ("sparse_rate", (0.02, 0.05, 0.1, 0.11, 0.12, 0.2)),
    "OFT": ("oft_block_size", WHOLE),
    "OSF": ("effective_rank", tuple(range(48, 64))),
    "PVERA": ("r", (16, 64, 128, 192, 224, 256)),
    "ROAD": ("variant", ("road_1", "road_2", "road_4")),
    "SUPERTUNING": ("sparsity", (0.8, 0.85, 0.875, 0.9)),
    "TINYLORA": ("u", (VALUES,)),
    "UNILORA": ("theta_d_length", (VALUES,)),
    "VBLORA": ("num_vectors", (4, 8, 12, 16, 24)),
    "VERA": ("r", (64, 128, 256, 448)),
    "WAVEFT": ("n_frequency", (VALUES,)),
}
#: what methods cannot do without here; and a start without effect, and a change that is not far too large
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_r": 1, "total_step": 1 << 20},
    "C3A": {"init_weights": True},
    "DELORA": {"delora_lambda": 1},
    "FOURIERFT": {"init_weights": True},
    "TINYLORA": {"r": 22},
    "BOFT": {"boft_block_num": 0},
    "FROD": {"progressbar": False},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": 0},
    "VBLORA": {"vector_length": 16},
}


@dataclass(frozen=True)
class Budget:
    steps: int = 300
    seeds: int = 3
    rates: tuple[float, ...] = (1e-3, 5e-3, 3e-2, 0.2, 1.0)


def methods() -> list[str]:
    return [name for name, row in METHODS.items() if issubclass(row.config_class, LayerConfig) and name not in OTHERS]


def _low_rank(base: nn.Linear) -> Tensor:
    return torch.randn(WIDTH, 4) @ torch.randn(4, WIDTH)


def _sparse(base: nn.Linear) -> Tensor:
    places = torch.randperm(WIDTH * WIDTH)[:VALUES]
    return torch.zeros(WIDTH * WIDTH).index_copy(0, places, torch.randn(VALUES)).view(WIDTH, WIDTH)


def _kronecker(base: nn.Linear) -> Tensor:
    return torch.kron(torch.randn(8, 8), torch.randn(8, 8))


def _fourier(base: nn.Linear) -> Tensor:
    return torch.fft.ifft2(_sparse(base)).real


def _diagonal(base: nn.Linear) -> Tensor:
    return torch.randn(WIDTH, 1) * base.weight


def _turned(base: nn.Linear, parts: Sequence[Tensor]) -> Tensor:
    """W Q - W for the rotation Q that turns each part, an orthonormal basis [WIDTH, 2 n], in n planes by one angle."""
    planes = sum(part.shape[1] for part in parts) // 2
    # n of the WIDTH / 2 planes turned by an angle a change W by about 2 sin(a / 2) sqrt(2 n / WIDTH) of its length
    angle = 2 * math.asin(min(1.0, SHARE / 2 / math.sqrt(2 * planes / WIDTH)))
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    q = torch.eye(WIDTH)
    for part in parts:
        within = torch.block_diag(*[turn] * (part.shape[1] // 2)) - torch.eye(part.shape[1])
        q = q + part @ within @ part.T
    return base.weight @ q - base.weight


def _rotation(base: nn.Linear) -> Tensor:
    return _turned(base, [torch.linalg.qr(torch.randn(WIDTH, 8))[0]])


def _rotation_in_blocks(base: nn.Linear) -> Tensor:
    bases = torch.linalg.qr(torch.randn(WIDTH // 16, 16, 16))[0]
    return _turned(base, [torch.eye(WIDTH)[:, 16 * at : 16 * at + 16] @ part for at, part in enumerate(bases)])


#: name -> the change of the weight; None is one of the bias
CHANGES: dict[str, Callable[[nn.Linear], Tensor] | None] = {
    "low rank (4)": _low_rank,
    "rotation in 4 planes": _rotation,
    "rotation in blocks": _rotation_in_blocks,
    "sparse (1/8)": _sparse,
    "Kronecker product": _kronecker,
    "Fourier (1/8)": _fourier,
    "diagonal": _diagonal,
    "bias": None,
}


def planted(change: str, seed: int) -> tuple[nn.Linear, Tensor]:
    """A layer, and its teacher's [weight^T; bias] [WIDTH + 1, WIDTH]."""
    torch.manual_seed(seed)
    base = nn.Linear(WIDTH, WIDTH)
    nn.init.normal_(base.weight, std=WIDTH**-0.5)
    make = CHANGES[change]
    with torch.no_grad():
        delta = torch.randn(WIDTH) if make is None else make(base)
        if "rotation" not in change:  # whose length is that of its angle
            delta *= SHARE * base.weight.norm() / delta.norm()
        weight = base.weight if make is None else base.weight + delta
        bias = base.bias + delta if make is None else base.bias
        return base, torch.cat([weight.T, bias[None]])


def adapted(method: str, base: nn.Linear, settings: dict[str, Any]) -> Any:
    config = METHODS[method].config_class(target_modules=["0"], **NEEDED.get(method, {}) | settings)
    return peft.get_peft_model(nn.Sequential(base), config).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def equalised(method: str) -> tuple[dict[str, Any], int]:
    """The settings with which the method trains closest to VALUES values, and how many these are."""
    config_class: Any = METHODS[method].config_class
    field, values = SIZES.get(method, ("r", WHOLE if hasattr(config_class, "r") else ()))
    found = []
    for settings in [{field: value} for value in values] or [{}]:
        torch.manual_seed(0)
        try:
            model = adapted(method, nn.Linear(WIDTH, WIDTH), settings)
        except (ValueError, TypeError):
            continue
        found.append((settings, sum(parameter.numel() for parameter in trained(model))))
    return min((pair for pair in found if pair[1]), key=lambda pair: abs(math.log(pair[1] / VALUES)))


#: what a layer makes of them is its weight and its bias, however a method changes these
ROWS = torch.cat([torch.eye(WIDTH), torch.zeros(1, WIDTH)])


def seen(out: Tensor) -> Tensor:
    """[weight^T; bias] of layers, from what they make of ROWS."""
    return torch.cat([out[..., :-1, :] - out[..., -1:, :], out[..., -1:, :]], -2)


def together(layers: Sequence[nn.Module]) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The trained tensors of layers with the same method and settings, and what all make of ROWS.

    They are one batched layer where their operations allow that and the result is the same, else a loop.
    """

    def loop() -> Tensor:
        return torch.stack([layer(ROWS) for layer in layers])

    try:
        parameters, buffers = stack_module_state(list(layers))
        batched = vmap(lambda *state: functional_call(layers[0], state, (ROWS,)), randomness="different")
        if torch.allclose(batched(parameters, buffers), loop(), atol=1e-5):
            return [p for p in parameters.values() if p.requires_grad], lambda: batched(parameters, buffers)
    except (RuntimeError, NotImplementedError):
        pass
    return [p for layer in layers for p in trained(layer)], loop


def recovered(method: str, rate: float, budget: Budget) -> Row:
    """By change: the share of the distance to the teacher that is gone, for each seed.

    Layers are in models of their own, so that none share a tensor; their losses are one sum.
    """
    settings, values = equalised(method)
    cells = [(change, seed) for change in CHANGES for seed in range(budget.seeds)]
    bases, teachers = zip(*(planted(*cell) for cell in cells), strict=True)
    goal = torch.stack(teachers)
    lengths = (torch.stack([seen(base(ROWS)) for base in bases]) - goal).flatten(1).norm(dim=1).detach()
    layers = []
    for (_, seed), base in zip(cells, bases, strict=True):
        torch.manual_seed(seed)
        layers.append(adapted(method, base, settings).base_model.model[0])
    parameters, forward = together(layers)

    def left() -> Tensor:
        return (seen(forward()) - goal).flatten(1).square().sum(1) / lengths**2

    optimizer = torch.optim.Adam(parameters, rate, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    for _ in range(budget.steps):
        left().nan_to_num().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for layer in layers:
        layer.eval()
    with torch.no_grad():
        found = (1 - left().sqrt()).nan_to_num(nan=-1.0, neginf=-1.0)
    shares: dict[str, list[float]] = {change: [] for change in CHANGES}
    for (change, _), share in zip(cells, found.tolist(), strict=True):
        shares[change].append(round(share, 4))
    return {"settings": settings, "values": values, "shares": shares}


def run(path: Path, budget: Budget, only: Sequence[str] = ()) -> None:
    """Adds to the file at `path` what it lacks."""
    for method, rate in itertools.product(only or methods(), budget.rates):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            key = {"method": method, "rate": rate, "budget": [budget.steps, budget.seeds]}
            add(path, key, partial(recovered, method, rate, budget))


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row["method"] == name] for name in dict.fromkeys(r["method"] for r in rows)}


def best(rows: Sequence[Row], change: str) -> tuple[float, float]:
    """Mean and half of the 95 % interval over the seeds, of the learning rate with the best mean."""
    return interval(max((row["shares"][change] for row in rows), key=mean))
