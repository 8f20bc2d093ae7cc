"""`forward` of the task classes says which arguments it has, and takes them by place and by name alike."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import llama, tokens

COMMON = ["output_attentions", "output_hidden_states", "return_dict", "task_ids", "kwargs"]
TEXT = ["input_ids", "attention_mask", "inputs_embeds"]
NAMES = {
    "CausalLM": [*TEXT, "labels", *COMMON],
    "SequenceClassification": [*TEXT, "labels", *COMMON],
    "TokenClassification": [*TEXT, "labels", *COMMON],
    "FeatureExtraction": [*TEXT, *COMMON],
    "Seq2SeqLM": [
        *(*TEXT, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels"),
        *COMMON,
    ],
    "QuestionAnswering": [
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("start_positions", "end_positions"),
        *COMMON,
    ],
}


@pytest.mark.parametrize("task", NAMES)
def test_the_arguments_of_forward_can_be_read(task):
    model_class = getattr(peft, f"PeftModelFor{task}")
    parameters = inspect.signature(model_class.forward).parameters
    assert list(parameters) == ["self", *NAMES[task]]
    assert all(parameters[name].default is None for name in NAMES[task][:-1])
    assert "active adapter" in model_class.forward.__doc__


def test_a_class_of_ones_own_keeps_its_forward_and_one_without_inherits():
    class Own(peft.PeftModelForCausalLM):
        def forward(self, x):
            return x

    class Inherits(peft.PeftModelForCausalLM):
        arguments = ("input_ids", "labels")

    assert list(inspect.signature(Own.forward).parameters) == ["self", "x"]
    assert list(inspect.signature(Inherits.forward).parameters) == ["self", "input_ids", "labels", "kwargs"]


@pytest.mark.parametrize("config", [LoraConfig, lambda **kw: PromptTuningConfig(num_virtual_tokens=3, **kw)])
def test_arguments_by_place_are_those_of_the_signature(config):
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    by_name = model(input_ids=ids, attention_mask=mask, labels=ids, return_dict=True)
    by_place = model(ids, mask, None, ids, return_dict=True)
    assert torch.equal(by_name.logits, by_place.logits) and torch.equal(by_name.loss, by_place.loss)
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="too many"):
        model(*[None] * 9)


class Plain(nn.Module):
    """A model with arguments of its own."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x, scale):
        return self.lin(x) * scale


def test_a_model_with_other_arguments_gets_them_by_place():
    base = Plain()
    x = torch.randn(2, 3)
    expected = base(x, 2.0)
    model = get_peft_model(base, LoraConfig(target_modules=["lin"], task_type="FEATURE_EXTRACTION"))
    assert torch.equal(model(x, 2.0), expected)


def test_a_trainer_keeps_the_columns_that_the_model_takes(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row, "comment": 0} for row in tokens()]
    arguments = transformers.TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    assert trainer.label_names == ["labels"]
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)
    assert trainer.train().global_step == 1
