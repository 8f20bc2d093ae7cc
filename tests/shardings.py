"""Ways to share a model out among processes, by what torch, transformers and DeepSpeed have for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft import PeftModel
from peft.core.wrappers import plain_name
from peft.integrations.fsdp import fsdp_auto_wrap_policy

RATE = 1e-2


def shares(splits_batch: bool) -> list[slice]:
    """The samples of each process, or group of processes."""
    return [slice(0, 2), slice(2, 4)] if splits_batch else [slice(None)]


@dataclass
class Sharding:
    """One way to share a model out.

    Attributes:
        name: what the matrix calls it.
        share: makes the model that is called of one (with an adapter, where that comes first).
        processes: how many.
        adapter_first: whether the adapter is there before the model is shared out.
        splits_batch: whether each process has samples of its own, over which gradients are averaged; else all have all.
        targets: the layers that get an adapter, where a method lets one choose.
        needs: the package without which it cannot be tried.
        methods: those that it is tried with; all where it says none.
    """

    name: str
    share: Callable[[nn.Module], Any]
    processes: int = 2
    adapter_first: bool = True
    splits_batch: bool = True
    targets: list[str] = field(default_factory=lambda: ["q_proj", "down_proj"])
    needs: str = "torch"
    methods: tuple[str, ...] = ()

    def rows(self) -> slice:
        """The samples of this process."""
        parts = shares(self.splits_batch)
        return parts[dist.get_rank() * len(parts) // self.processes]

    def base(self, model: nn.Module) -> nn.Module:
        """A base model, before it gets its adapter."""
        return model

    def shared(self, model: nn.Module) -> Any:
        """What is called in place of the model, shared out."""
        return self.share(model)

    def backward(self, runs: Any, loss: Tensor) -> None:
        loss.backward()

    def whole(self, runs: Any, gradients: bool = False) -> AbstractContextManager[Any]:
        """Where merging may take place."""
        return nullcontext()

    def gradients(self, model: PeftModel, runs: Any) -> dict[str, Tensor] | None:
        """The whole gradients, by the names that parameters have in one process; None where nobody gives them."""
        return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}

    def state_dict(self, runs: Any) -> dict[str, Tensor] | None:
        """What `save_pretrained` gets as `state_dict`."""
        return None

    def optimizer(self, runs: Any) -> Any:
        return torch.optim.Adam([p for p in runs.parameters() if p.requires_grad], lr=RATE)

    def zero_grad(self, runs: Any, optimizer: Any) -> None:
        optimizer.zero_grad()

    def step(self, runs: Any, optimizer: Any) -> None:
        optimizer.step()


# ---- DDP, FSDP2, tensor parallelism


def _ddp(model: nn.Module) -> nn.Module:
    """As transformers' Trainer has it for a PeftModel: some methods train tensors of which some have no effect."""
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(model: nn.Module, mesh: Any = None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    """By hand, with torch's `parallelize_module`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {}
    for path, _ in model.named_modules():
        kind = path.rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            plan[path] = ColwiseParallel()
        elif kind in ("o_proj", "down_proj"):
            plan[path] = RowwiseParallel()
        elif kind == "embed_tokens":
            plan[path] = RowwiseParallel(input_layouts=Replicate())
        elif kind == "lm_head":
            plan[path] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def by_transformers(model: nn.Module, **settings: Any) -> nn.Module:
    """By transformers' own plans, as `from_pretrained` reads them."""
    from transformers.distributed import DistributedConfig

    with shared_folder() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        return type(model).from_pretrained(folder, distributed_config=DistributedConfig(**settings)).eval()


def _two_dimensions(model: nn.Module) -> nn.Module:
    """Tensor parallel in pairs, and each part shared out again by `fully_shard`."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fsdp2(tensor_parallel(model, mesh["tp"]), mesh["dp"])


# ---- FSDP1


class Fsdp1(Sharding):
    """FSDP's first version: tensors are whole inside `summon_full_params`, the first process saves alone."""

    def __init__(self, name: str, use_orig_params: bool, **settings: Any):
        super().__init__(name, _ddp)
        self.original, self.settings = use_orig_params, settings

    def shared(self, model: nn.Module) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=fsdp_auto_wrap_policy(model),
            use_orig_params=self.original,
            device_id=torch.device("cpu"),
            **self.settings,
        )

    def whole(self, runs: Any, gradients: bool = False) -> AbstractContextManager[Any]:
        return runs.summon_full_params(runs, writeback=True, with_grads=gradients and self.original)

    def gradients(self, model: PeftModel, runs: Any) -> dict[str, Tensor] | None:
        if not self.original:
            return None
        with self.whole(runs, gradients=True):
            trained = ((plain_name(name), p.grad) for name, p in model.named_parameters() if p.requires_grad)
            return {name: whole(gradient) for name, gradient in trained if gradient is not None}

    def state_dict(self, runs: Any) -> dict[str, Tensor] | None:
        from torch.distributed.fsdp import FullStateDictConfig, StateDictType

        full = FullStateDictConfig(rank0_only=True)
        with runs.state_dict_type(runs, StateDictType.FULL_STATE_DICT, full):
            return runs.state_dict()


# ---- DeepSpeed

#: nothing is kept whole between two uses, however small
PARTITION = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip


class Zero(Sharding):
    """DeepSpeed's stages: an engine that has the optimizer."""

    def __init__(self, name: str, stage: int, base_first: bool = False):
        super().__init__(name, _ddp, needs="deepspeed")
        self.base_first = base_first
        self.config = {
            "train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, **PARTITION},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip

    def base(self, model: nn.Module) -> nn.Module:
        if self.base_first:
            deepspeed().zero.Init(module=model, config_dict_or_path=self.config)
        return model

    def shared(self, model: nn.Module) -> Any:
        return deepspeed().initialize(model=model, optimizer=super().optimizer(model), config=self.config)[0]

    def optimizer(self, runs: Any) -> Any:
        return runs.optimizer

    def backward(self, runs: Any, loss: Tensor) -> None:
        runs.backward(loss)

    def gradients(self, model: PeftModel, runs: Any) -> dict[str, Tensor] | None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = {name: deepspeed().utils.safe_get_full_grad(p) for name, p in trained.items()}
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    def zero_grad(self, runs: Any, optimizer: Any) -> None:
        runs.zero_grad()

    def step(self, runs: Any, optimizer: Any) -> None:
        runs.step()


def deepspeed() -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It would compile an operation for processes of one machine, which nobody needs here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, and not used: the processes have met
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


#: a module of torch that is there with DTensors, from 2.5 on
DTENSOR = "torch.distributed.tensor.placement_types"
COLUMNS, ROWS = ["q_proj", "up_proj"], ["o_proj", "down_proj"]
TP = partial(Sharding, adapter_first=False, splits_batch=False, needs=DTENSOR)
SHARDINGS: dict[str, Sharding] = {
    sharding.name: sharding
    for sharding in (
        Sharding("DDP", _ddp),
        Fsdp1("FSDP1", use_orig_params=True),
        Fsdp1("FSDP1 flat", use_orig_params=False),
        Sharding("FSDP2", fsdp2, needs=DTENSOR),
        Sharding("FSDP2 first", fsdp2, adapter_first=False, needs=DTENSOR),
        Zero("ZeRO-2", 2),
        Zero("ZeRO-3", 3),
        Zero("ZeRO-3 first", 3, base_first=True),
        TP("TP colwise", tensor_parallel, targets=COLUMNS),
        TP("TP rowwise", tensor_parallel, targets=ROWS),
        TP("TP embeddings", tensor_parallel, targets=["embed_tokens", "lm_head"]),
        TP("TP transformers", partial(by_transformers, tp_size=2, tp_plan="auto"), targets=[*COLUMNS, *ROWS]),
        TP(
            "EP transformers",
            partial(by_transformers, tp_size=2, ep_size=2),
            methods=("LORA experts", "LORA beside experts"),
        ),
        Sharding(
            "FSDP2 x TP", _two_dimensions, processes=4, adapter_first=False, targets=[*COLUMNS, *ROWS], needs=DTENSOR
        ),
    )
}


# ---- what processes see together


def whole(tensor: Any) -> Tensor:
    """A tensor without its share-out; a call of all processes."""
    if hasattr(tensor, "ds_id"):
        with deepspeed().zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def values(model: nn.Module, sharding: Sharding, runs: Any) -> Mapping[str, Tensor]:
    """All parameters of a model that is shared out, whole, by their plain names."""
    with sharding.whole(runs):
        return {plain_name(name): whole(parameter) for name, parameter in model.named_parameters()}


def mean(value: Tensor) -> Tensor:
    """The mean over all processes."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


@contextmanager
def shared_folder() -> Iterator[str]:
    """A folder that all processes see, for a while."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    folder = str(made[0])
    yield folder
    dist.barrier()
    if dist.get_rank() == 0:
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        os.rmdir(folder)
