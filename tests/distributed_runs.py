"""Methods on models that several processes share out: what each of them sees, beside the same in one process.

A *cell* is a method and a `Sharding`. Its processes meet over gloo on the CPU, run `observe` together, and each answers
with the promises that held and what was found where one did not. `Pool` keeps the processes for the next cell, with a
limit of time for each.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tiny_models
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.registry import METHODS

CAUSAL = {"task_type": "CAUSAL_LM"}
#: some that are among the samples
TOKENS = [int(token) for token in tiny_models.tokens(4, 8)[:2, 0]]
#: method -> what it needs to fit the model, beyond its targets
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "lora_alpha": 6},
    "LORA DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "LORA PiSSA": {"r": 4, "init_lora_weights": "pissa"},
    "LORA biases": {"r": 4, "bias": "all", "target_modules": ["v_proj"]},
    "LORA embeddings": {"r": 4, "target_modules": ["embed_tokens", "lm_head"]},
    "LORA modules_to_save": {"r": 4, "modules_to_save": ["lm_head"]},
    "LORA trainable_token_indices": {"r": 4, "trainable_token_indices": TOKENS, "target_modules": ["q_proj", "o_proj"]},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 100, "tinit": 2, "tfinal": 2},
    "ADAMSS": {"r": 4, "num_subspaces": 2, "subspace_rank": 2, "save_clusters": True},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4, "init_weights": True},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4, "delora_lambda": 3},
    "FOURIERFT": {"n_frequency": 20, "init_weights": True},
    "FROD": {"sparse_rate": 0.1, "progressbar": False},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 4, "hybrid_r": 2, "alpha": 6},
    "HIRA": {"r": 3},
    "HRA": {"r": 4},
    "LILY": {"r": 4},
    "LOHA": {"r": 2},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "PEANUT": {"r": 4, "depth": 1, "act_fn": "gelu"},
    "POLY": {"r": 2, "n_tasks": 3, "n_skills": 2, "init_weights": False},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2},
    "PSOFT": {"r": 3, "psoft_alpha": 6},
    "PVERA": {"r": 6},
    "RANDLORA": {"r": 3, "randlora_alpha": 1},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 1},
    "SUPERTUNING": {"sparsity": 0.8},
    "TINYLORA": {"r": 2, "u": 6},
    "TRAINABLE_TOKENS": {"token_indices": TOKENS},
    "UNILORA": {"r": 2, "theta_d_length": 20, "init_theta_d_bound": 1e-3},
    "VBLORA": {"num_vectors": 6, "vector_length": 8, "init_vector_bank_bound": 1e-2},
    "VERA": {"r": 6},
    "WAVEFT": {"n_frequency": 20, "scaling": 2.0},
}
#: methods that find their place by themselves
UNTARGETED = {"ADAPTION_PROMPT", "SHADOW", "TRAINABLE_TOKENS", "LN_TUNING", "XLORA"}
#: methods whose change is none of a weight
UNMERGED = {"ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA"}
#: whose forward pass needs each sample's task
BY_TASK = {"POLY", "MULTITASK_PROMPT_TUNING"}
ALL_METHODS = [*METHODS, *(name for name in SETTINGS if " " in name)]


def config_of(method: str, targets: list[str]) -> Any:
    name = method.split()[0]
    row = METHODS[name]
    fields = {**CAUSAL, **SETTINGS.get(method, {})}
    if not row.prompt and name not in UNTARGETED:
        fields.setdefault("target_modules", targets)
    if name == "XLORA":
        fields |= {"hidden_size": 32, "adapters": {str(seed): saved_lora(tuple(targets), seed) for seed in (1, 2)}}
    if name == "IA3":
        fields["feedforward_modules"] = []
    if name == "BEFT":
        fields["target_modules"] = ["v_proj"]
    return row.config_class(**fields)


@lru_cache
def saved_lora(targets: tuple[str, ...], seed: int) -> str:
    """A folder with a LoRA, for this process."""
    folder = tempfile.mkdtemp()
    filled(adapted(base_model(), "LORA", [*targets]), seed).save_pretrained(folder)
    return folder


def base_model(method: str = "") -> nn.Module:
    return tiny_models.llama(attention_bias=method in ("BEFT", "LORA biases"), use_cache=method != "XLORA")


def batch(method: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Four samples, or some of them."""
    ids = tiny_models.tokens(4, 8)[rows]
    inputs = {"input_ids": ids, "labels": ids}
    return {**inputs, "task_ids": torch.tensor([0, 2, 1, 0])[rows]} if method in BY_TASK else inputs


def adapted(model: nn.Module, method: str, targets: list[str]) -> PeftModel:
    return get_peft_model(model, config_of(method, targets)).eval()


def filled(model: PeftModel, seed: int = 1) -> PeftModel:
    """With random values in all that is trained, so that the adapter changes the output as a trained one does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


# ---- how a model is shared out


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
    """

    name: str
    share: Callable[[nn.Module], nn.Module]
    processes: int = 2
    adapter_first: bool = True
    splits_batch: bool = True
    targets: list[str] = field(default_factory=lambda: ["q_proj", "down_proj"])

    def shares(self) -> list[slice]:
        """The samples of each process, or group of processes."""
        return [slice(0, 2), slice(2, 4)] if self.splits_batch else [slice(None)]

    def rows(self) -> slice:
        """The samples of this process."""
        shares = self.shares()
        return shares[dist.get_rank() * len(shares) // self.processes]

    def loss(self, runs: nn.Module, method: str) -> Tensor:
        """The loss of this process's samples."""
        return runs(**batch(method, self.rows())).loss

    def backward(self, runs: nn.Module, loss: Tensor) -> None:
        loss.backward()

    def gradients(self, model: PeftModel) -> dict[str, Tensor]:
        """The whole gradients, by the names that parameters have in one process. A call of all processes."""
        return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}

    def state_dict(self, runs: nn.Module) -> dict[str, Tensor] | None:
        """What `save_pretrained` gets as `state_dict`. A call of all processes."""
        return None

    def optimizer(self, runs: nn.Module) -> Any:
        return torch.optim.Adam([p for p in runs.parameters() if p.requires_grad], lr=1e-2)

    def step(self, runs: nn.Module, optimizer: Any) -> None:
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its share-out; a call of all processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp2(model: nn.Module, mesh: Any = None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
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


def _by_transformers(model: nn.Module, **sizes: Any) -> nn.Module:
    """By transformers' own plan, as `from_pretrained` reads it."""
    from transformers.distributed import DistributedConfig

    with shared_folder() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        config = DistributedConfig(tp_plan="auto", **sizes)
        return type(model).from_pretrained(folder, distributed_config=config).eval()


def _two_dimensions(model: nn.Module) -> nn.Module:
    """Tensor parallel in pairs, and each part shared out again by `fully_shard`."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return _fsdp2(_tensor_parallel(model, mesh["tp"]), mesh["dp"])


LORA = METHODS["LORA"].config_class
COLUMNS, ROWS = ["q_proj", "up_proj"], ["o_proj", "down_proj"]
TP = partial(Sharding, adapter_first=False, splits_batch=False)
SHARDINGS: dict[str, Sharding] = {
    sharding.name: sharding
    for sharding in (
        Sharding("DDP", _ddp),
        Sharding("FSDP2", _fsdp2),
        Sharding("FSDP2 first", _fsdp2, adapter_first=False),
        TP("TP colwise", _tensor_parallel, targets=COLUMNS),
        TP("TP rowwise", _tensor_parallel, targets=ROWS),
        TP("TP embeddings", _tensor_parallel, targets=["embed_tokens", "lm_head"]),
        TP("TP transformers", partial(_by_transformers, tp_size=2), targets=[*COLUMNS, *ROWS]),
        Sharding("FSDP2 x TP", _two_dimensions, processes=4, adapter_first=False, targets=[*COLUMNS, *ROWS]),
    )
}


# ---- what is seen


class Broken(AssertionError):
    """A promise that does not hold."""


@dataclass
class Alone:
    """The same in one process."""

    state: dict[str, Tensor]
    values: dict[str, Tensor]
    output: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    trained: list[float]


STEPS = 5


def alone(method: str, sharding: Sharding) -> Alone:
    torch.manual_seed(7)
    model = filled(adapted(base_model(method), method, sharding.targets))
    state = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        output = model(**batch(method)).logits
    shares = sharding.shares()

    def mean_loss() -> Tensor:  # some methods (Lily) average over all tokens that they are given
        return torch.stack([model(**batch(method, rows)).loss for rows in shares]).mean()

    loss = mean_loss()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trained = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        step = mean_loss()
        step.backward()
        optimizer.step()
        allocate(model, len(trained))
        trained.append(float(step.detach()))
    return Alone(state, values, output, loss.detach(), gradients, trained)


def shared_out(method: str, sharding: Sharding, expected: Alone) -> tuple[PeftModel, nn.Module]:
    """The model with its adapter, and what is called (the same, or a wrapper around it)."""
    if sharding.adapter_first:
        torch.manual_seed(7)
        model = filled(adapted(base_model(method), method, sharding.targets))
        return model, sharding.share(model)
    torch.manual_seed(100 + dist.get_rank())  # whatever the state of its generator, all processes start the same
    base = sharding.share(base_model(method))
    model = adapted(base, method, sharding.targets)
    for name, p in model.named_parameters():
        if p.requires_grad or "default" in name.split("."):
            assert_same_everywhere(f"start of {name}", whole(p))
    if METHODS[method.split()[0]].prompt:  # files have what an encoder makes, not the encoder
        with torch.no_grad():
            for name, value in expected.values.items():
                model.get_parameter(name).copy_(value)
        return model, model
    missing = set_peft_model_state_dict(model, expected.state)
    if missing.missing_keys or missing.unexpected_keys:
        raise Broken(f"loading: {missing}")
    return model, model


def observe(method: str, sharding: Sharding) -> dict[str, str]:
    """Promise -> "" where it holds, else what was found."""
    found: dict[str, str] = {}
    expected = alone(method, sharding)
    model, runs = shared_out(method, sharding, expected)
    optimizer = sharding.optimizer(runs)
    loss = sharding.loss(runs, method)
    with promise(found, "loss"):
        assert_close("loss", mean(loss), expected.loss)
    with promise(found, "gradients"):
        sharding.backward(runs, loss)
        gradients = sharding.gradients(model)
        if gradients.keys() != expected.gradients.keys():
            raise Broken(f"gradients of {sorted(gradients.keys() ^ expected.gradients.keys())[:3]}")
        for name, value in expected.gradients.items():
            assert_close(name, gradients[name], value)
    with promise(found, "files"):
        check_files(method, sharding, model, runs, expected)
    if not METHODS[method.split()[0]].prompt and method not in UNMERGED:
        with promise(found, "merging"):
            check_merging(method, sharding, model, runs)
    with promise(found, "training"):
        check_training(method, sharding, model, runs, optimizer, expected)
    return found


def check_files(method: str, sharding: Sharding, model: PeftModel, runs: nn.Module, expected: Alone) -> None:
    """Saved by all and loaded by one: the same file and the same output; loaded by all again: the same loss."""
    with shared_folder() as folder:
        model.save_pretrained(folder, state_dict=sharding.state_dict(runs), is_main_process=dist.get_rank() == 0)
        dist.barrier()
        loaded = PeftModel.from_pretrained(base_model(method), folder)
        state = get_peft_model_state_dict(loaded)
        if state.keys() != expected.state.keys():
            raise Broken(f"names in the file: {sorted(state.keys() ^ expected.state.keys())[:3]}")
        wrong = [name for name, value in state.items() if not torch.equal(value, expected.state[name])]
        if wrong:
            raise Broken(f"another value in the file: {wrong[:3]}")
        with torch.no_grad():
            assert_close("output of the file in one process", loaded(**batch(method)).logits, expected.output, 1e-5)
        if not sharding.adapter_first:
            trainable = not METHODS[method.split()[0]].prompt
            again = PeftModel.from_pretrained(sharding.share(base_model(method)), folder, is_trainable=trainable).eval()
            assert_close("loss of the file", mean(sharding.loss(again, method)), expected.loss)


def check_merging(method: str, sharding: Sharding, model: PeftModel, runs: nn.Module) -> None:
    with torch.no_grad():
        before = {name: whole(p) for name, p in model.named_parameters()}
        expected = mean(sharding.loss(runs, method))
        model.merge_adapter()
        if all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters()):
            raise Broken("merging changes nothing")
        assert_close("merged", mean(sharding.loss(runs, method)), expected, 1e-5)
        model.unmerge_adapter()
        assert_close("unmerged", mean(sharding.loss(runs, method)), expected, 0)
        for name, p in model.named_parameters():
            if not torch.equal(whole(p), before[name]):
                raise Broken(f"{name} is not what it was before merging")


def allocate(model: PeftModel, step: int) -> None:
    """What AdaLoRA asks for in each step."""
    if model.peft_type == "ADALORA":
        model.base_model.update_and_allocate(step)


def check_training(
    method: str, sharding: Sharding, model: PeftModel, runs: nn.Module, optimizer: Any, expected: Alone
) -> None:
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = sharding.loss(runs, method)
        losses.append(float(mean(loss)))
        sharding.backward(runs, loss)
        sharding.step(runs, optimizer)
        allocate(model, len(losses) - 1)
    if losses[-1] >= losses[0]:
        raise Broken(f"training raises the loss: {losses}")
    assert_close("losses in training", torch.tensor(losses), torch.tensor(expected.trained), 1e-3)


def assert_close(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the largest entry (of 1, where that is less)."""
    if found.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)}, in one process {tuple(expected.shape)}")
    off = float((found - expected).abs().max()) if found.numel() else 0.0
    scale = max(1.0, float(expected.abs().max())) if found.numel() else 1.0
    if not off <= tolerance * scale:
        raise Broken(f"{what}: off by {off:.2g} of {scale:.2g}")


def mean(value: Tensor) -> Tensor:
    """The mean over all processes."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def everywhere(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return parts


def assert_same_everywhere(what: str, value: Tensor) -> None:
    parts = everywhere(value)
    if not all(torch.equal(part, parts[0]) for part in parts):
        raise Broken(f"{what}: not the same on all processes")


@contextmanager
def promise(found: dict[str, str], name: str) -> Iterator[None]:
    """Notes whether what is in it holds; what else is raised ends the cell."""
    found[name] = ""
    try:
        yield
    except Broken as broken:
        found[name] = str(broken)


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


# ---- special to a kind of sharding


def dropout_is_the_same() -> None:
    """Under tensor parallelism, whatever the state of each process's generator."""
    torch.manual_seed(dist.get_rank())
    model = get_peft_model(
        _tensor_parallel(base_model()),
        LORA(r=4, lora_dropout=0.5, use_dora=True, init_lora_weights=False, target_modules=[*COLUMNS, *ROWS], **CAUSAL),
    ).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch("")).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    for name, p in model.named_parameters():
        if "lora" in name:
            assert_same_everywhere(name, p)
    assert losses[0] != losses[1]


def what_is_refused() -> str:
    """A module that tensor parallelism shares out, and whose kind is not known there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"1": SequenceParallel()})
    before = [name for name, _ in model.named_modules()]
    try:
        get_peft_model(model, METHODS["LN_TUNING"].config_class(target_modules=["1"]))
    except ValueError as error:
        assert [name for name, _ in model.named_modules()] == before
        return str(error)
    return ""


def resumed() -> None:
    """By torch's own state dicts, which take tensors that several modules hold once."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    for method in ("VERA", "RANDLORA"):
        model = filled(adapted(base_model(), method, COLUMNS))
        runs = _fsdp2(model)
        expected = runs(**batch("")).loss.detach()
        state = get_model_state_dict(runs)
        again = adapted(base_model(), method, COLUMNS)
        other = _fsdp2(again)
        set_model_state_dict(other, state)
        assert torch.equal(other(**batch("")).loss.detach(), expected)


# ---- processes that stay

#: seconds that the processes may take to start
START = 300.0


def _worker(rank: int, processes: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    meet = f"file://{folder}/meet"
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes, timeout=timeout)
    base_model()  # imports take a while
    pipe.send("ready")
    while True:
        task = pipe.recv()
        if task is None:
            break
        try:
            pipe.send(("seen", task()))
        except Exception as error:
            pipe.send(("raised", f"{type(error).__name__}: {error}", traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """Processes that run one task after the other together. Where they do not end it alike they are replaced."""

    def __init__(self, processes: int = 2):
        self.processes = processes
        self._running: list[tuple[Any, Any]] = []

    def run(self, task: Callable[[], Any], limit: float = 60.0) -> list[tuple[Any, ...]]:
        """What each process answers: `("seen", value)`, `("raised", message, traceback)` or `("no answer",)`.

        Args:
            task: a function of a module; all processes call it.
            limit: seconds.
        """
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send(task)
        answers: list[tuple[Any, ...]] = [("no answer",)] * self.processes
        end = time.monotonic() + limit
        waiting = set(range(self.processes))
        while waiting and time.monotonic() < end:
            for rank in list(waiting):
                process, pipe = self._running[rank]
                if pipe.poll(0.02):
                    answers[rank] = pipe.recv()
                    waiting.discard(rank)
                    if answers[rank][0] == "raised":  # the others wait for it, perhaps for ever
                        end = min(end, time.monotonic() + 2)
                elif not process.is_alive():
                    answers[rank], end = ("no answer",), min(end, time.monotonic() + 2)
                    waiting.discard(rank)
        if len({answer[:2] if answer[0] == "raised" else answer[0] for answer in answers}) > 1 or not all(
            answer[0] in ("seen", "raised") for answer in answers
        ):
            self.close(kill=True)  # they are not at the same place any more
        return answers

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        for rank in range(self.processes):
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(rank, self.processes, folder, there), daemon=True)
            process.start()
            self._running.append((process, here))
        for _, pipe in self._running:
            if not pipe.poll(START) or pipe.recv() != "ready":
                raise RuntimeError("The processes do not start.")

    def close(self, kill: bool = False) -> None:
        for process, pipe in self._running:
            if kill:
                process.kill()
            else:
                pipe.send(None)
            process.join(10)
        self._running = []


def run_cell(method: str, sharding: str) -> dict[str, str]:
    return observe(method, SHARDINGS[sharding])


def outcome(pool: Pool, method: str, sharding: str, limit: float = 60.0) -> str:
    """What the matrix says of a cell: "yes", "refused: ..." (an error that the library raises), or what broke."""
    answers = pool.run(partial(run_cell, method, sharding), limit)
    raised = [answer[1] for answer in answers if answer[0] == "raised"]
    if len(raised) == len(answers) and all(text.startswith(("ValueError", "NotImplementedError")) for text in raised):
        return f"refused: {raised[0].partition(': ')[2]}"
    if raised:
        return f"raises {raised[0]}"
    if any(answer[0] != "seen" for answer in answers):
        return f"no answer within {limit:.0f} s"
    broken = [f"{name}: {what}" for _, found in answers for name, what in found.items() if what]
    return "; ".join(dict.fromkeys(broken)) or "yes"
