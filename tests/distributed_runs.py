"""Methods on models that several processes share out: what each of them sees, beside the same in one process.

A *cell* is a method and a `Sharding`. Its processes meet over gloo on the CPU, run `observe` together, and each answers
with the promises that held and what was found where one did not.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardings
import tiny_models
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.wrappers import plain_name
from peft.registry import METHODS
from processes import Pool
from shardings import COLUMNS, RATE, ROWS, SHARDINGS, Sharding, Zero, mean, shared_folder, shares, values, whole

CAUSAL = {"task_type": "CAUSAL_LM"}
#: some that are among the samples
TOKENS = [int(token) for token in tiny_models.tokens(4, 8)[:2, 0]]
#: method -> what it needs to fit the model, beyond its targets
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "lora_alpha": 6},
    "LORA DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "LORA PiSSA": {"r": 4, "init_lora_weights": "pissa"},
    "LORA biases": {"r": 4, "bias": "all", "target_modules": ["v_proj"]},
    "LORA experts": {"r": 4, "target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
    "LORA beside experts": {"r": 4, "target_modules": ["q_proj", "o_proj", "lm_head"]},
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
    "OFT constrained": {"oft_block_size": 4, "coft": True, "eps": 0.1},
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
    return copy.deepcopy(_built(method.endswith("experts"), method in ("BEFT", "LORA biases"), method != "XLORA"))


@lru_cache
@torch.random.fork_rng()
def _built(experts: bool, attention_bias: bool, use_cache: bool) -> nn.Module:
    if experts:
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        small |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": tiny_models.VOCABULARY}
        return tiny_models._build("MixtralConfig", "MixtralForCausalLM", 0, initializer_range=0.2, **small)
    return tiny_models.llama(attention_bias=attention_bias, use_cache=use_cache)


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


def loss_of(sharding: Sharding, runs: Any, method: str) -> Tensor:
    """The loss of this process's samples."""
    return runs(**batch(method, sharding.rows())).loss


@lru_cache(None)  # many shardings ask for the same
def alone(method: str, targets: tuple[str, ...], splits_batch: bool) -> Alone:
    torch.manual_seed(7)
    model = filled(adapted(base_model(method), method, [*targets]))
    with torch.no_grad():
        output = model(**batch(method)).logits  # the first: some methods then limit the size of their tensors
    state = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    own = ((name, p) for name, p in model.named_parameters() if p.requires_grad or "default" in name.split("."))
    values = {name: p.detach().clone() for name, p in own}

    def mean_loss() -> Tensor:  # some methods (Lily) average over all tokens that they are given
        return torch.stack([model(**batch(method, rows)).loss for rows in shares(splits_batch)]).mean()

    loss = mean_loss()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    trained = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        step = mean_loss()
        step.backward()
        allocate(model, len(trained))
        optimizer.step()
        trained.append(float(step.detach()))
    return Alone(state, values, output, loss.detach(), gradients, trained)


def shared_out(method: str, sharding: Sharding, expected: Alone) -> tuple[PeftModel, Any]:
    """The model with its adapter, and what is called (the same, or a wrapper around it)."""
    if sharding.adapter_first:
        torch.manual_seed(7)
        model = filled(adapted(sharding.base(base_model(method)), method, sharding.targets))
        return model, sharding.shared(model)
    torch.manual_seed(100 + dist.get_rank())  # whatever the state of its generator, all processes start the same
    base = sharding.shared(base_model(method))
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
    expected = alone(method, tuple(sharding.targets), sharding.splits_batch)
    model, runs = shared_out(method, sharding, expected)
    optimizer = sharding.optimizer(runs)  # before the first pass, after which fully_shard leaves the root together
    with torch.no_grad(), promise(found, "loss"):
        assert_close("loss", mean(loss_of(sharding, runs, method)), expected.loss)
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
            again = PeftModel.from_pretrained(sharding.shared(base_model(method)), folder, is_trainable=trainable)
            assert_close("loss of the file", mean(loss_of(sharding, again.eval(), method)), expected.loss)


def check_merging(method: str, sharding: Sharding, model: PeftModel, runs: nn.Module) -> None:
    with torch.no_grad():
        before = values(model, sharding, runs)
        expected = mean(loss_of(sharding, runs, method))
        with sharding.whole(runs):
            model.merge_adapter()
        if all(torch.equal(value, before[name]) for name, value in values(model, sharding, runs).items()):
            raise Broken("merging changes nothing")
        assert_close("merged", mean(loss_of(sharding, runs, method)), expected, 1e-5)
        with sharding.whole(runs):
            model.unmerge_adapter()
        assert_close("unmerged", mean(loss_of(sharding, runs, method)), expected, 0)
        for name, value in values(model, sharding, runs).items():
            if not torch.equal(value, before[name]):
                raise Broken(f"{name} is not what it was before merging")


def allocate(model: PeftModel, step: int) -> None:
    """What AdaLoRA asks for in each step."""
    if model.peft_type == "ADALORA":
        model.base_model.update_and_allocate(step)


def check_training(
    method: str, sharding: Sharding, model: PeftModel, runs: Any, optimizer: Any, expected: Alone
) -> None:
    """The gradients of the first step, and the losses of some."""
    losses: list[float] = []
    for step in range(STEPS):
        sharding.zero_grad(runs, optimizer)
        loss = loss_of(sharding, runs, method)
        losses.append(float(mean(loss)))
        sharding.backward(runs, loss)
        if step == 0:
            check_gradients(sharding.gradients(model, runs), expected.gradients)
        with sharding.whole(runs, gradients=True):
            allocate(model, step)
        sharding.step(runs, optimizer)
    if losses[-1] >= losses[0]:
        raise Broken(f"training raises the loss: {losses}")
    assert_close("losses in training", torch.tensor(losses), torch.tensor(expected.trained), 1e-3)


def check_gradients(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    if found is None:
        return
    found = {name: value for name, value in found.items() if name in expected or value.any()}  # ZeRO-2 makes zeros
    if found.keys() != expected.keys():
        raise Broken(f"gradients of {sorted(found.keys() ^ expected.keys())[:3]}")
    for name, value in found.items():
        assert_close(f"gradient of {name}", value, expected[name])


def assert_close(what: str, found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest entry (of 1, where that is less)."""
    if found.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)}, in one process {tuple(expected.shape)}")
    off = float((found - expected).abs().max()) if found.numel() else 0.0
    scale = max(1.0, float(expected.abs().max())) if found.numel() else 1.0
    if not off <= tolerance * scale:
        raise Broken(f"{what}: off by {off:.2g} of {scale:.2g}")


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


# ---- special to a kind of sharding


def dropout_is_the_same() -> None:
    """Under tensor parallelism, whatever the state of each process's generator."""
    torch.manual_seed(dist.get_rank())
    model = get_peft_model(
        shardings.tensor_parallel(base_model()),
        LoraConfig(r=4, lora_dropout=0.5, use_dora=True, init_lora_weights=False, target_modules=[*COLUMNS, *ROWS]),
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
        runs = shardings.fsdp2(model)
        expected = runs(**batch("")).loss.detach()
        state = get_model_state_dict(runs)
        again = adapted(base_model(), method, COLUMNS)
        other = shardings.fsdp2(again)
        set_model_state_dict(other, state)
        assert torch.equal(other(**batch("")).loss.detach(), expected)


def limited_in_half_precision_fsdp1() -> None:
    from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

    half = MixedPrecision(param_dtype=torch.bfloat16)
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        for precision in (half, None) if strategy == ShardingStrategy.NO_SHARD else (half,):
            settings = {"sharding_strategy": strategy, "mixed_precision": precision}
            limited_in_half_precision(shardings.Fsdp1(f"FSDP1 {strategy.name}", use_orig_params=True, **settings))


def limited_in_half_precision_fsdp2() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    limited_in_half_precision(Sharding("FSDP2", lambda model: fully_shard(model, mp_policy=policy)))


def limited_in_half_precision_zero() -> None:
    for sharding in (Zero("ZeRO-2", 2), Zero("ZeRO-3", 3)):
        sharding.config["bf16"] = {"enabled": True}
        limited_in_half_precision(sharding, shardings.deepspeed().utils.safe_get_full_fp32_param)


def limited_in_half_precision(sharding: Sharding, read: Callable[[Tensor], Tensor] = whole) -> None:
    """A limit on the size of tensors leaves what is trained in full precision as it is, but for that size."""

    def trained() -> dict[str, Tensor]:
        with sharding.whole(runs):
            return {name: read(p).detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    for method in ("CPT", "OFT constrained"):
        model = filled(adapted(base_model(), method, COLUMNS))
        alone = copy.deepcopy(model)
        runs = sharding.shared(model)
        before = trained()
        loss_of(sharding, runs, method)
        if sharding.name == "FSDP2":
            runs.reshard()
        alone(**batch(method))
        for name, value in trained().items():
            share = value / before[name]
            expected = alone.get_parameter(plain_name(name)).detach() / before[name]
            assert_close(f"{sharding.name} {method} {name}", share, share[:, :1].expand_as(share))
            assert_close(f"{sharding.name} {method} {name}", share, expected, 1e-2)
            assert share.min() < 0.9


def cut_up() -> None:
    """What FSDP1 has cut up is neither saved nor merged into, and what is said names the way out."""
    for method in ("LORA", "P_TUNING"):
        sharding = SHARDINGS["FSDP1"]
        model = adapted(base_model(), method, COLUMNS)
        runs = sharding.shared(model)
        loss_of(sharding, runs, method)
        with shared_folder() as folder:
            calls = [partial(model.save_pretrained, folder)]
            calls += [model.merge_adapter] if method == "LORA" else []
            for call in calls:
                try:
                    call()
                except RuntimeError as error:
                    assert "summon_full_params" in str(error)
                else:
                    raise Broken("what is cut up was taken for whole")
            dist.barrier()
            assert not os.path.exists(f"{folder}/adapter_model.safetensors")


def by_trainer() -> None:
    """transformers' Trainer with a configuration of DeepSpeed trains, saves, and the file is right in one process."""
    from transformers import Trainer, TrainingArguments

    shardings.deepspeed()
    stage = {"stage": 3, **shardings.PARTITION, "stage3_gather_16bit_weights_on_model_save": True}
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": stage}

    def output(model: Any) -> Tensor:
        with torch.no_grad():
            return model(**batch("")).logits

    with shared_folder() as folder:
        args = TrainingArguments(
            folder, use_cpu=True, max_steps=3, per_device_train_batch_size=2, learning_rate=RATE, report_to="none",
            save_strategy="no", deepspeed=config,
        )  # fmt: skip
        torch.manual_seed(7)
        model = adapted(base_model(), "LORA DoRA", COLUMNS)
        start = output(model)
        ids = tiny_models.tokens(4, 8)
        trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
        trainer.train()
        trainer.model_wrapped.eval()
        trained = output(trainer.model_wrapped)
        trainer.save_model(folder)
        dist.barrier()
        assert_close("output of the file", output(PeftModel.from_pretrained(base_model(), folder)), trained, 1e-4)
        assert not torch.allclose(trained, start, atol=1e-3)


# ---- cells


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
