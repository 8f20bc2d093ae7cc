"""The model card of a saved adapter: `README.md`, with the block of metadata that the hub reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft.errors import warn
from peft.folder import find, read_at_rest
from peft.hub import CARD_NAME
from peft.version import __version__

#: task -> the class that loads its adapters, and what the hub calls it, where the task type leaves no doubt
TASKS: dict[str | None, tuple[str, str | None]] = {
    "CAUSAL_LM": ("AutoPeftModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoPeftModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoPeftModelForSequenceClassification", None),
    "TOKEN_CLS": ("AutoPeftModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoPeftModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoPeftModelForFeatureExtraction", "feature-extraction"),
    None: ("AutoPeftModel", None),
}

#: a new card
NEW_CARD = Path(__file__).with_suffix(".md")

#: bytes that a card may have
MAX_BYTES = 8 << 20

_ADAPTER_TAG = "base_model:adapter:"
_PROCEDURE = "## Training procedure"
_VERSIONS = "### Framework versions"


def model_card(
    folder: str | os.PathLike | None,
    *,
    method: str,
    base_model: str | None = None,
    task_type: str | None = None,
    tags: Iterable[str] = (),
    quantization: Mapping[str, Any] | None = None,
) -> str | None:
    """Text of the model card: the one in `folder` brought up to date, or a new one.

    What a person or another program wrote into an existing card stays; its metadata gains what is known about the
    adapter. A card that cannot be understood is left alone: it is returned as it is, or None if it is no text, with a
    warning.

    Args:
        folder: where a `README.md` may lie; None for a new card.
        method: one of [`PeftType`].
        base_model: name of the base model. Only an id of the hub goes into the metadata, since the hub refuses a
            card that names a local path there.
        task_type: one of [`TaskType`], or None.
        tags: further tags, such as "transformers" where the base model is of that library.
        quantization: how the base model's weights were held in training, by setting.
    """
    from huggingface_hub import ModelCard

    base_id = base_model if base_model and _is_hub_id(base_model) else None
    path = os.path.join(folder or "", CARD_NAME)
    text = None
    try:
        if folder is not None:
            text = read_at_rest(folder, CARD_NAME, lambda: _text(folder))
        card = ModelCard(_new_card(method, base_model, base_id, task_type) if text is None else text)
        _bring_up_to_date(card, method, base_id, task_type, tags)
        card.text = _with_version(_with_quantization(card.text, quantization))
        return str(card)
    except Exception as error:
        if text is None and not (folder is not None and os.path.lexists(path)):
            raise
        warn(f"{path} is left as it is, it cannot be read: {error}")
        return text


def _bring_up_to_date(card: Any, method: str, base_id: str | None, task_type: str | None, tags: Iterable[str]) -> None:
    """Lets the card's metadata say what is known of the adapter."""
    data = card.data
    data["library_name"] = "peft"
    kept, new = _as_list(data.get("tags")), {*tags, *(["lora"] if method == "LORA" else [])}
    if base_id is not None:
        ours = _ADAPTER_TAG + base_id
        kept = [tag for tag in kept if tag == ours or not tag.startswith(_ADAPTER_TAG)]  # those for others go
        new.add(ours)
        if base_id not in _as_list(data.get("base_model")):
            data["base_model"] = base_id
    data["tags"] = [*kept, *sorted(new.difference(kept))]
    if not data.get("pipeline_tag") and TASKS[task_type][1]:
        data["pipeline_tag"] = TASKS[task_type][1]


def _text(folder: str | os.PathLike) -> str | None:
    """The card in a folder; None if there is none. Raises where it is no text, or too long for one."""
    path = find(folder, CARD_NAME)
    if path is None:
        if os.path.isdir(os.path.join(folder, CARD_NAME)):
            raise IsADirectoryError("it is a directory.")
        return None
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB.")
    return Path(path).read_text("utf-8-sig")


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _new_card(method: str, base_model: str | None, base_id: str | None, task_type: str | None) -> str:
    link = f"[{base_id}](https://huggingface.co/{base_id})" if base_id else f"`{base_model}`"
    return NEW_CARD.read_text(encoding="utf-8").format(
        method=method,
        of_base=f" for {os.path.basename(base_model.rstrip('/'))}" if base_model else "",
        base=f", {link}" if base_model else "",
        auto_class=TASKS[task_type][0],
    )


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _with_quantization(text: str, quantization: Mapping[str, Any] | None) -> str:
    """`text` with the settings under the heading of the training procedure, unless it speaks of them already."""
    if not quantization or "quantization config" in text:
        return text
    method = quantization.get("quant_method") or "bitsandbytes"
    section = f"`{getattr(method, 'value', method)}` quantization config of the base model in training:\n\n"
    section += "".join(f"- {name}: {value}\n" for name, value in quantization.items())
    return _under_heading(text, _PROCEDURE, section + "\n")


def _with_version(text: str) -> str:
    """`text` with this version in the list of framework versions, in place of an older one."""
    line = f"- PEFT {__version__}"
    updated, found = re.subn(r"(?m)^- PEFT \S+", line, text)
    return updated if found else _under_heading(text, _VERSIONS, line + "\n")


def _under_heading(text: str, heading: str, section: str) -> str:
    """`text` with `section` below `heading`, which is put at the end where there is none."""
    before, found, after = text.partition(heading + "\n")
    if not found:
        return f"{text.rstrip()}\n\n{heading}\n\n{section}"
    return f"{before}{heading}\n\n{section}{after.lstrip()}"
