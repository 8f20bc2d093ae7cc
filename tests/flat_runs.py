"""Methods on models whose parameters lie in flat tensors: FSDP1's, and the partitions of DeepSpeed's ZeRO.

`observe` runs in two processes together (`distributed_runs.Pool`): it trains, saves, loads, merges and unmerges, and
compares each with one process.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distributed_runs as runs
import tiny_models
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from peft.integrations.fsdp import fsdp_auto_wrap_policy
from peft.registry import METHODS

TARGETS = ["q_proj", "down_proj"]
STEPS, RATE = 3, 0.05
#: nothing is kept whole between two uses, however small
PARTITION = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip
KINDS = ["FSDP1", "FSDP1 flat", "ZeRO-2", "ZeRO-3", "ZeRO-3 first"]


def deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **PARTITION},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


class Shared:
    """A model with an adapter, shared out among two processes.

    Args:
        method: the method.
        kind: one of `KINDS`; with `first`, the base model is shared out before it gets the adapter.
    """

    def __init__(self, method: str, kind: str):
        self.fsdp = kind.startswith("FSDP1")
        base = runs.base_model(method)
        if kind == "ZeRO-3 first":
            _deepspeed().zero.Init(module=base, config_dict_or_path=deepspeed_config(3))
        torch.manual_seed(7)
        self.model = tiny_models.fill_adapter(runs.adapted(base, method, TARGETS))
        if self.fsdp:
            from torch.distributed.fsdp import FullyShardedDataParallel

            policy = fsdp_auto_wrap_policy(self.model)
            original, device = kind == "FSDP1", torch.device("cpu")
            self.runs: Any = FullyShardedDataParallel(
                self.model, auto_wrap_policy=policy, use_orig_params=original, device_id=device
            )
            self.optimizer = torch.optim.SGD(_trained(self.runs), lr=RATE)
        else:
            optimizer, config = torch.optim.SGD(_trained(self.model), lr=RATE), deepspeed_config(int(kind[5]))
            self.runs = _deepspeed().initialize(model=self.model, optimizer=optimizer, config=config)[0]

    def step(self, loss: Tensor) -> None:
        if self.fsdp:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self.runs.backward(loss)
            self.runs.step()

    def whole(self) -> AbstractContextManager[Any]:
        """While it lasts, what FSDP1 has cut up is whole."""
        return self.runs.summon_full_params(self.runs, writeback=True) if self.fsdp else nullcontext()

    def save(self, folder: str) -> None:
        """FSDP1: all gather, the first saves alone. DeepSpeed: all save, the first writes."""
        first = dist.get_rank() == 0
        if not self.fsdp:
            self.model.save_pretrained(folder, is_main_process=first)
            return
        from torch.distributed.fsdp import FullStateDictConfig, StateDictType

        full = FullStateDictConfig(rank0_only=True)
        with self.runs.state_dict_type(self.runs, StateDictType.FULL_STATE_DICT, full):
            state = self.runs.state_dict()
        if first:
            self.model.save_pretrained(folder, state_dict=state)


def _deepspeed() -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It would compile an operation for processes of one machine, which nobody needs here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, and not used: the processes have met
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loss(model: Any, method: str, rows: slice) -> Tensor:
    return model(**runs.batch(method, rows)).loss


HALVES = [slice(0, 2), slice(2, 4)]


def alone(method: str) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Losses, the trained tensors and the output of one process."""
    torch.manual_seed(7)
    model = tiny_models.fill_adapter(runs.adapted(runs.base_model(method), method, TARGETS))
    optimizer, losses = torch.optim.SGD(_trained(model), lr=RATE), []
    for _ in range(STEPS):
        loss = torch.stack([_loss(model, method, rows) for rows in HALVES]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, get_peft_model_state_dict(model), _output(model, method)


@torch.no_grad()
def _output(model: Any, method: str) -> Tensor:
    return model(**runs.batch(method)).logits


def observe(method: str, kind: str) -> None:
    """Raises `Broken` where something is not as in one process."""
    losses, state, output = alone(method)
    shared = Shared(method, kind)
    model, found = shared.model, []
    for _ in range(STEPS):
        loss = _loss(shared.runs, method, HALVES[dist.get_rank()])
        found.append(float(runs.mean(loss)))
        shared.step(loss)
    runs.assert_close("losses", torch.tensor(found), torch.tensor(losses), 1e-5)
    trained = _output(shared.runs, method)
    runs.assert_close("output", trained, output, 1e-4)
    _check_files(shared, method, state, output)
    if METHODS[method.split()[0]].prompt or method in runs.UNMERGED:
        return
    with shared.whole():
        model.merge_adapter()
    runs.assert_close("merged", _output(shared.runs, method), output, 1e-4)
    with shared.whole():
        model.unmerge_adapter()
    runs.assert_close("unmerged", _output(shared.runs, method), trained, 0)


def _check_files(shared: Shared, method: str, state: dict[str, Tensor], output: Tensor) -> None:
    with runs.shared_folder() as folder:
        shared.save(folder)
        dist.barrier()
        saved = load_peft_weights(folder, "cpu")
        if saved.keys() != state.keys():
            raise runs.Broken(f"names in the file: {sorted(saved.keys() ^ state.keys())[:3]}")
        for name, value in state.items():
            runs.assert_close(name, saved[name], value, 1e-4)
        loaded = PeftModel.from_pretrained(runs.base_model(method), folder)
        runs.assert_close("output of the file in one process", _output(loaded, method), output, 1e-4)
        if shared.fsdp:
            _check_refused(shared, folder)


def _check_refused(shared: Shared, folder: str) -> None:
    """What FSDP1 has cut up is neither saved nor merged into, and says what to do."""
    calls = [lambda: shared.model.save_pretrained(f"{folder}/cut")]
    if hasattr(shared.model.base_model, "merge_adapter"):
        calls.append(shared.model.base_model.merge_adapter)
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            if "summon_full_params" not in str(error):
                raise
        else:
            raise runs.Broken("what is cut up was taken for whole")
    if os.path.exists(f"{folder}/cut/adapter_model.safetensors"):
        raise runs.Broken("a file was made of what is cut up")


# ---- transformers' Trainer


def with_trainer() -> None:
    """Trains under ZeRO-3, saves, and loads in one process; raises `Broken` where outputs differ."""
    from transformers import Trainer, TrainingArguments

    _deepspeed()
    stage = {"stage": 3, **PARTITION, "stage3_gather_16bit_weights_on_model_save": True}
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": stage}
    with runs.shared_folder() as folder:
        args = TrainingArguments(
            folder, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
            save_strategy="no", deepspeed=config,
        )  # fmt: skip
        torch.manual_seed(7)
        model = runs.adapted(runs.base_model(), "LORA DoRA", TARGETS)
        start = _output(model, "")
        ids = tiny_models.tokens(4, 8)
        trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
        trainer.train()
        trainer.model_wrapped.eval()
        trained = _output(trainer.model_wrapped, "")
        trainer.save_model(folder)
        dist.barrier()
        loaded = PeftModel.from_pretrained(runs.base_model(), folder)
        runs.assert_close("output of the file in one process", _output(loaded, ""), trained, 1e-4)
        if torch.allclose(trained, start, atol=1e-3):
            raise runs.Broken("nothing was trained")
