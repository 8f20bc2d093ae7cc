"""Base models and tokenizers from transformers, adapters on them, and text out of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from peft import PeftConfig, PeftModel

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def transformers() -> Any:
    """The library, without its progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def device_of(name: str | None) -> torch.device:
    """The device of that name; a GPU if there is one where none is named."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(name: str | None) -> torch.dtype | None:
    """`torch.float32` and the like, by name.

    Raises:
        ValueError: there is no such floating point type.
    """
    dtype = getattr(torch, name, None) if name else None
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype takes float32, bfloat16 or float16, got {name!r}")
    return dtype


def task_of(model: str) -> str:
    """What a base model is trained for here: `SEQ_2_SEQ_LM` for an encoder with a decoder, else `CAUSAL_LM`."""
    config = transformers().AutoConfig.from_pretrained(model)
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def load_base(model: str, class_name: str, *, dtype: torch.dtype | None, device: torch.device, **kwargs: Any) -> Any:
    """A base model, by the name of its class in transformers."""
    base = getattr(transformers(), class_name).from_pretrained(model, **kwargs)
    if dtype is not None:
        base = base.to(dtype)
    return base if base.device == device else base.to(device)


def load_tokenizer(model: str, adapter: str | None = None) -> Any:
    """The tokenizer saved with the adapter if there is one, else that of the base model; it has a token to pad with."""
    own = adapter is not None and os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))
    tokenizer = transformers().AutoTokenizer.from_pretrained(adapter if own else model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_adapted(adapter: str, *, model: str | None, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """(a `PeftModel`, its tokenizer) for a saved adapter, on the base model that it names or on `model`.

    Raises:
        ValueError: there is no adapter there, or it names no base model and none is given.
    """
    config = PeftConfig.from_pretrained(adapter)
    source = model or config.base_model_name_or_path
    if not source:
        raise ValueError(f"the adapter {adapter!r} names no base model; give it with --model")
    if config.task_type:
        class_name = AUTO_CLASSES[str(getattr(config.task_type, "value", config.task_type))]
    else:
        class_name = (config.auto_mapping or {}).get("base_model_class") or AUTO_CLASSES[task_of(source)]
    revision = {"revision": config.revision} if config.revision and not model else {}
    base = load_base(source, class_name, dtype=dtype_of(dtype), device=device_of(device), **revision)
    return PeftModel.from_pretrained(base, adapter), load_tokenizer(source, adapter)


def write_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """What the model writes: the prompt and how it goes on, or the answer of an encoder-decoder.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    draw = dict(do_sample=True, temperature=temperature, top_k=top_k) if temperature > 0 else dict(do_sample=False)
    torch.manual_seed(seed)
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **draw)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
