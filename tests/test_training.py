"""Training for real: with the Trainer, with Accelerate, with a plain loop, in one process and in two."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tiny_models as tiny
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    cast_mixed_precision_params,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from peft.pickles import safe_pickles


@dataclass
class Task:
    """A base model, the adapter for it, and what it shall learn."""

    build: Any
    config: dict[str, Any]
    data: type[Dataset]
    rows: dict[str, Dataset] = field(init=False)

    def __post_init__(self):
        self.rows = {"train": self.data(16, seed=0), "eval": self.data(8, seed=1)}

    def model(self, seed=3):
        """The adapted model, with a start of its own for each seed."""
        base = self.build()
        torch.manual_seed(seed)
        return get_peft_model(base, LoraConfig(r=8, lora_dropout=0.1, **self.config))

    def loss(self, model):
        """The loss over the rows for evaluation, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            return model(**whole(self.rows["eval"])).loss.item()


TASKS = {
    "causal": Task(
        tiny.llama, dict(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"]), tiny.Counting
    ),
    "seq2seq": Task(tiny.t5, dict(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi", "wo"]), tiny.OneAnswer),
}


@pytest.fixture(params=list(TASKS))
def task(request):
    return TASKS[request.param]


def whole(dataset):
    """All rows as one batch."""
    return {key: torch.stack([row[key] for row in dataset]) for key in dataset[0]}


def plain_loop(model, dataset, steps=20, lr=0.02, forward_in=nullcontext):
    """Full-batch training as PyTorch users write it; returns the losses. Forwards run inside `forward_in()`."""
    batch = whole(dataset)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with forward_in():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def keys_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def assert_holds_the_adapter_alone(folder, model):
    """The folder has the adapter's tensors, nothing of the base model, and loads onto a fresh base."""
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith(("model", "pytorch_model"))]
    assert keys_of(folder) == set(get_peft_model_state_dict(model))
    assert all("lora_" in key for key in keys_of(folder))


# ---------------------------------------------------------------------------------------------------- the Trainer


def trainer_for(task, model, folder, callbacks=(), **changes):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **changes,
    )
    data = dict(train_dataset=task.rows["train"], eval_dataset=task.rows["eval"])
    return Trainer(model=model, args=arguments, callbacks=list(callbacks), **data)


def test_the_trainer_trains_evaluates_and_saves_the_adapter_alone(task, tmp_path):
    before, model = tiny.base_state(task.build()), task.model()
    untrained = task.loss(model)

    trainer = trainer_for(task, model, tmp_path)
    trainer.train()

    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4 and evaluations[-1] < evaluations[0] < untrained
    tiny.assert_base_untouched(model, before)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 4
    for folder in checkpoints:
        assert_holds_the_adapter_alone(folder, model)
    loaded = PeftModel.from_pretrained(task.build(), trainer.state.best_model_checkpoint)
    assert task.loss(loaded) == pytest.approx(task.loss(model), rel=1e-6)


def test_the_trainer_loads_the_best_checkpoint_at_the_end(task, tmp_path):
    """Calling the highest loss the best makes it the first epoch's, which is not what training ended with."""
    model = task.model()
    trainer = trainer_for(task, model, tmp_path, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    with safe_open(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors", "pt") as file:
        for key, value in get_peft_model_state_dict(model).items():
            assert torch.equal(value, file.get_tensor(key)), key
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


@pytest.mark.skipif(not safe_pickles(), reason="transformers resumes a run with torch 2.6 or later")
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(task, tmp_path):
    from transformers import TrainerCallback

    class StopAfterTwoEpochs(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.epoch >= 2

    before, straight = tiny.base_state(task.build()), task.model()
    trainer_for(task, straight, tmp_path / "straight").train()

    trainer_for(task, task.model(), tmp_path / "stopped", [StopAfterTwoEpochs()]).train()
    assert len(list((tmp_path / "stopped").glob("checkpoint-*"))) == 2
    resumed = task.model(seed=4)
    trainer = trainer_for(task, resumed, tmp_path / "stopped")
    trainer.train(resume_from_checkpoint=True)

    assert trainer.state.global_step == 16
    expected = get_peft_model_state_dict(straight)
    for key, value in get_peft_model_state_dict(resumed).items():
        assert torch.equal(value, expected[key]), key
    tiny.assert_base_untouched(resumed, before)


def test_the_trainer_with_gradient_checkpointing_and_bf16(task, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # transformers 4.57 sets it, for good
    model = task.model()
    before = tiny.base_state(task.build())
    untrained = task.loss(model)
    checkpointing = {"use_reentrant": False}  # the default from transformers 5 on
    trainer = trainer_for(
        task, model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=checkpointing, bf16=True
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < untrained
    tiny.assert_base_untouched(model, before)


# ------------------------------------------------------------------------------------------------------ Accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_and_saves_the_adapter_alone(task, precision, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    before, model = tiny.base_state(task.build()), task.model()
    untrained = task.loss(model)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(task.rows["train"], batch_size=4))
    prepared.train()
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model and task.loss(model) < untrained
    state = accelerator.get_state_dict(prepared)
    main = accelerator.is_main_process
    unwrapped.save_pretrained(tmp_path, is_main_process=main, save_function=accelerator.save, state_dict=state)

    tiny.assert_base_untouched(model, before)
    assert_holds_the_adapter_alone(tmp_path, model)
    assert task.loss(PeftModel.from_pretrained(task.build(), tmp_path)) == pytest.approx(task.loss(model), rel=1e-6)
    AcceleratorState._reset_state(reset_partial_state=True)


# -------------------------------------------------------------------------------------------------- the plain loop


def test_a_plain_loop_trains_and_saves_the_adapter_alone(task, tmp_path):
    before, model = tiny.base_state(task.build()), task.model()
    losses = plain_loop(model, task.rows["train"])
    assert losses[-1] < losses[0] / 2
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.save_pretrained(tmp_path)
    tiny.assert_base_untouched(model, before)
    assert_holds_the_adapter_alone(tmp_path, model)
    loaded = PeftModel.from_pretrained(task.build(), tmp_path)
    assert task.loss(loaded) == task.loss(model)


def test_a_loaded_adapter_is_trained_on_only_if_it_was_asked_for(task, tmp_path):
    model = task.model()
    first = plain_loop(model, task.rows["train"], steps=10)
    model.save_pretrained(tmp_path)

    frozen = PeftModel.from_pretrained(task.build(), tmp_path)
    assert not [p for p in frozen.parameters() if p.requires_grad]
    again = PeftModel.from_pretrained(task.build(), tmp_path, is_trainable=True)
    second = plain_loop(again, task.rows["train"], steps=10)
    assert second[0] < first[0] and second[-1] < first[-1]


def test_only_the_active_adapter_learns():
    task = TASKS["causal"]
    model = task.model()
    model.add_adapter("other", LoraConfig(**task.config))
    tiny.fill_adapter(model, "other")
    other = get_peft_model_state_dict(model, adapter_name="other")
    other = {key: value.clone() for key, value in other.items()}
    plain_loop(model, task.rows["train"], steps=3)
    for key, value in get_peft_model_state_dict(model, adapter_name="other").items():
        assert torch.equal(value, other[key])

    ours = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    model.set_adapter("other")
    plain_loop(model, task.rows["train"], steps=3)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, ours[key])
    learned = get_peft_model_state_dict(model, adapter_name="other")
    assert any(not torch.equal(value, other[key]) for key, value in learned.items())


# ------------------------------------------------------------------------------------------------ dtypes and memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_trains_an_adapter_in_fp32(dtype):
    task = TASKS["causal"]
    base = task.build().to(dtype)
    before = tiny.base_state(base)
    model = get_peft_model(base, LoraConfig(**task.config))
    losses = plain_loop(model, task.rows["train"])
    assert losses[-1] < losses[0] / 2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    tiny.assert_base_untouched(model, before)


def test_autocast_trains_a_half_precision_adapter_on_request():
    task = TASKS["causal"]
    model = get_peft_model(task.build().bfloat16(), LoraConfig(**task.config), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    cast_mixed_precision_params(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = plain_loop(model, task.rows["train"], forward_in=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", list(TASKS))
def test_gradient_checkpointing_changes_no_gradient(name, reentrant, when):
    task = TASKS[name]

    def gradients(checkpointing):
        base = task.build()
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if checkpointing and when == "before wrapping":
            base.gradient_checkpointing_enable(**kwargs)
        torch.manual_seed(5)
        model = tiny.fill_adapter(get_peft_model(base, LoraConfig(**task.config)))
        if checkpointing and when == "after wrapping":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(**kwargs)
        model.train()
        assert model.is_gradient_checkpointing == checkpointing
        model(**whole(task.rows["train"])).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    expected = gradients(False)
    for key, value in gradients(True).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7)


def test_preparing_a_plain_model_freezes_it_and_makes_it_fp32():
    base = prepare_model_for_kbit_training(tiny.llama().bfloat16())
    assert not [p for p in base.parameters() if p.requires_grad]
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    task = TASKS["causal"]
    losses = plain_loop(get_peft_model(base, LoraConfig(**task.config)), task.rows["train"])
    assert losses[-1] < losses[0] / 2


# ---------------------------------------------------------------------------------- more than the adapter is trained


def test_modules_to_save_are_trained_beside_an_untouched_original(tmp_path):
    task = TASKS["causal"]
    base = task.build()
    before = tiny.base_state(base)
    model = get_peft_model(base, LoraConfig(**task.config, modules_to_save=["lm_head"]))
    losses = plain_loop(model, task.rows["train"])
    assert losses[-1] < losses[0] / 2
    tiny.assert_base_untouched(model, before)
    trained = get_peft_model_state_dict(model)["base_model.model.lm_head.weight"]
    assert not torch.allclose(trained, before["lm_head.weight"])

    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in keys_of(tmp_path)
    assert task.loss(PeftModel.from_pretrained(task.build(), tmp_path)) == task.loss(model)


@pytest.mark.parametrize(
    ("build", "module", "indices"),
    [
        (tiny.llama, "model.embed_tokens", [5, 11, 30]),
        (tiny.llama, "model.embed_tokens", {"embed_tokens": [5, 11, 30]}),
        (tiny.gpt2, "transformer.wte", {"wte": [5, 11, 30]}),  # tied to the head
    ],
    ids=["list", "dict", "tied"],
)
def test_single_tokens_are_trained_and_no_others(build, module, indices, tmp_path):
    targets, transposed = (["c_attn"], True) if build is tiny.gpt2 else (["q_proj"], False)
    fields = dict(task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=transposed)
    base = build()
    embedding = base.get_input_embeddings().weight.detach().clone()
    before = tiny.base_state(base)
    model = get_peft_model(base, LoraConfig(**fields, trainable_token_indices=indices))
    losses = plain_loop(model, tiny.Counting(), steps=10)
    assert losses[-1] < losses[0]
    tiny.assert_base_untouched(model, before)

    model.save_pretrained(tmp_path)
    deltas = [key for key in keys_of(tmp_path) if "trainable_tokens_delta" in key]
    assert deltas == [f"base_model.model.{module}.token_adapter.trainable_tokens_delta"]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.get_slice(deltas[0]).get_shape() == [3, 32]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=tiny.tokens()).logits
        loaded = PeftModel.from_pretrained(build(), tmp_path)
        assert torch.equal(loaded(input_ids=tiny.tokens()).logits, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-4)

    changed = (merged.get_input_embeddings().weight != embedding).any(dim=1).nonzero().flatten().tolist()
    assert changed == [5, 11, 30]
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == (build is tiny.gpt2)


def test_biases_are_trained_with_the_adapter_and_stored(tmp_path):
    model = get_peft_model(tiny.opt(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="lora_only"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert {name.split("self_attn.")[1] for name in trained} == {"q_proj.base_layer.bias"}
    plain_loop(model, tiny.Counting(), steps=3)
    model.save_pretrained(tmp_path)
    assert len([key for key in keys_of(tmp_path) if key.endswith("q_proj.base_layer.bias")]) == 2
    model.eval()
    # What is trained is not computed in one with the frozen layer, so this one is to be trained as well.
    loaded = PeftModel.from_pretrained(tiny.opt(), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tiny.tokens()).logits, model(input_ids=tiny.tokens()).logits)


def test_soft_prompts_train_under_the_trainer(task, tmp_path):
    prompt = PromptTuningConfig(task_type=task.config["task_type"], num_virtual_tokens=8)
    model = get_peft_model(task.build(), prompt)
    untrained = task.loss(model)
    trainer = trainer_for(task, model, tmp_path)
    trainer.train()
    assert task.loss(model) < untrained
    loaded = PeftModel.from_pretrained(task.build(), trainer.state.best_model_checkpoint)
    assert task.loss(loaded) == pytest.approx(task.loss(model), rel=1e-6)


# ------------------------------------------------------------------------------------------------ several processes

STEPS, WORLD = 5, 2


def mlp_with_lora():
    model = get_peft_model(tiny.MLP(), LoraConfig(target_modules=["lin0", "lin1"], r=4))
    return tiny.fill_adapter(model)


def regression_rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def train_regression(model, x, y):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def distributed_worker(rank, folder):
    """One of two processes: trains on its half of the rows, and takes part in saving."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    model = mlp_with_lora()
    x, y = (rows.chunk(WORLD)[rank] for rows in regression_rows())
    train_regression(nn.parallel.DistributedDataParallel(model), x, y)
    model.save_pretrained(f"{folder}/adapter", is_main_process=rank == 0)
    model.save_pretrained(f"{folder}/of-rank-{rank}", is_main_process=rank == 0)
    torch.save(get_peft_model_state_dict(model), f"{folder}/state-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_train_one_adapter_and_the_main_one_saves_it(tmp_path):
    torch.multiprocessing.spawn(distributed_worker, args=(str(tmp_path),), nprocs=WORLD)

    alone = mlp_with_lora()
    train_regression(alone, *regression_rows())
    expected = get_peft_model_state_dict(alone)
    ranks = [torch.load(tmp_path / f"state-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for key, value in expected.items():
        assert torch.equal(ranks[0][key], ranks[1][key])
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-4, atol=1e-6)
    assert_holds_the_adapter_alone(tmp_path / "adapter", alone)
    assert list((tmp_path / "of-rank-0").glob("*")) and not list((tmp_path / "of-rank-1").glob("*"))
    loaded = PeftModel.from_pretrained(tiny.MLP(), tmp_path / "adapter")
    for key, value in get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, ranks[0][key])
