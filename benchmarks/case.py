"""What a benchmark is: parts that are measured, rows that say what is divided by what; and the model that most share.

A group of benchmarks is a module with `TITLE`, `TEXT` and `cases(scale)`. It runs with huggingface/peft as well as with
this library, so it uses nothing but what both offer.
"""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

#: all linear projections of a Llama layer
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    hidden: int = 512
    intermediate: int = 1376
    layers: int = 4
    vocabulary: int = 1000
    batch: int = 4
    length: int = 256
    #: the same where half precision may be slow
    half_batch: int = 2
    half_length: int = 64
    #: distinct adapters in a mixed batch; tokens that a decoding run adds
    adapters: int = 32
    tokens: int = 16
    #: what "many adapters" are
    many: int = 100
    #: linear modules of the models made of experts
    modules: tuple[int, int] = (4500, 18000)
    #: layers of the models on the meta device that look like a 7B and a 70B Llama
    meta_layers: tuple[int, int] = (32, 80)
    #: size of the adapter that is saved and loaded
    megabytes: int = 200
    #: layers of 60 million parameters each that are merged into; 16 are a 1B model
    merged_layers: int = 4

    def for_dtype(self, dtype: str) -> Scale:
        """The sizes of a training step in `dtype`."""
        return replace(self, batch=self.half_batch, length=self.half_length) if dtype == "bf16" else self


SCALES = {
    "full": Scale(),
    "quick": Scale(many=30, modules=(900, 3600), megabytes=50, merged_layers=2),
    "smoke": Scale(64, 128, 1, 64, 2, 8, 2, 8, 4, 2, 4, (12, 48), (1, 2), 1, 0),
}


class Clock:
    """Measures what happens in its `with` blocks, all of them together."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.seconds = now, 0.0

    def __enter__(self) -> None:
        _wait_for_device()
        self._start = self.now()

    def __exit__(self, *_: object) -> None:
        _wait_for_device()
        self.seconds += self.now() - self._start


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


#: One measurement: enters the clock for what counts, or returns what it measured itself.
Part = Callable[[Clock], "float | None"]


@dataclass
class Prepared:
    """A case that is ready to be measured.

    Attributes:
        parts: what is measured, by name; run in this order.
        outcome: what has to be the same with every library, by name.
        tolerance: largest difference allowed between outcomes, relative to the largest entry of each.
    """

    parts: dict[str, Part]
    outcome: dict[str, Tensor] = field(default_factory=dict)
    tolerance: float = 1e-3


@dataclass
class Row:
    """A line of a table: `part`, divided by the part `over` of the same library, or by the reference's if None.

    `target` is what the quotient should be at most; `unit` is "s", "B", or whatever the parts return.
    """

    name: str
    part: str
    over: str | None = None
    target: float | None = None
    unit: str = "s"


@dataclass
class Case:
    """Some rows that one preparation serves.

    `runs` and `warm_up` are for what takes long. In a run, the parts take turns `rounds` times; the ratio of each of
    these rounds counts by itself.
    """

    name: str
    prepare: Callable[[], Prepared]
    rows: list[Row]
    runs: int | None = None
    warm_up: bool = True
    rounds: int = 1


def llama(scale: Scale, dtype: torch.dtype = torch.float32, device: str = "cpu", **fields: Any) -> Any:
    """A frozen Llama with random weights, the same in every process."""
    return _frozen("Llama", scale, dtype, device, **fields)


def mixtral(scale: Scale, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """The same for a Mixtral of eight experts, each as wide as the Llama's MLP."""
    return _frozen("Mixtral", scale, dtype, "cpu", num_local_experts=8, **fields)


def _frozen(name: str, scale: Scale, dtype: torch.dtype, device: str, **fields: Any) -> Any:
    import transformers

    sizes = dict(
        hidden_size=scale.hidden, intermediate_size=scale.intermediate, num_hidden_layers=scale.layers,
        vocab_size=scale.vocabulary, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        config = getattr(transformers, f"{name}Config")(**{**sizes, **fields})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.to(dtype).requires_grad_(False).eval()


def twin(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def fill(model: nn.Module, scale: float = 0.02) -> None:
    """Gives every trainable parameter values that depend on its name and shape alone."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * scale
            with torch.no_grad():
                parameter.copy_(values.to(parameter.dtype))


def fill_cheaply(tensors: Iterable[Tensor], scale: float = 0.02) -> None:
    """Gives large tensors on the CPU values without drawing each of them."""
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * scale
    for tensor in tensors:
        for piece in tensor.data.view(-1).split(noise.numel()):
            piece.copy_(noise[: piece.numel()])


def sample(tensor: Tensor, count: int = 256) -> Tensor:
    """Entries of a tensor, evenly spaced."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // count)].float().cpu()


def gradients(model: nn.Module) -> Tensor:
    """Norms of the gradients of the trainable parameters, in the order of their names."""
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return torch.stack([torch.zeros(()) if p.grad is None else p.grad.float().norm().cpu() for _, p in named])
