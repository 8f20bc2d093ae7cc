"""Mistakes of users, and the exceptions that tell them: what huggingface/peft raises is raised here too.

`data/errors.json` has a call per line, the exception class (or those that will do as well) and words that its message
must have; a line without `raises` must pass silently. Lines for methods that are not there yet are skipped until they
are.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import peft
import tiny_models

CASES = json.loads((Path(__file__).parent / "data" / "errors.json").read_text(encoding="utf-8"))

#: what huggingface/peft refuses and this library does
WORKS_HERE = {
    "adapter-names-dora",
    "adapter-names-mha",
    "adapter-names-parameters",
    "ia3-unsupported",
    "prefix-gradient-checkpointing",
    "loha-unsupported",
    "mixed-model-type",
}


# ---- the models that the calls name


def mlp(sizes=(16, 32, 16, 4), bias=True):
    layers = [(f"lin{i}", nn.Linear(sizes[i], sizes[i + 1], bias=bias)) for i in range(3)]
    return nn.Sequential(OrderedDict([layers[0], ("act", nn.ReLU()), *layers[1:]]))


def emb_linear():
    return nn.Sequential(OrderedDict(emb=nn.Embedding(24, 16), lin0=nn.Linear(16, 16)))


def conv(groups=1):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 8, 3, groups=groups), flat=nn.Flatten()))


def ln():
    return nn.Sequential(OrderedDict(lin0=nn.Linear(16, 32), norm=nn.LayerNorm(32), lin1=nn.Linear(32, 4)))


def rnn():
    return nn.Sequential(OrderedDict(rnn=nn.GRU(16, 16)))


def stack():
    blocks = [nn.Sequential(OrderedDict(up=nn.Linear(16, 32), down=nn.Linear(32, 16))) for _ in range(3)]
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*blocks)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        return self.mha(x, x, x)[0]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x):
        return torch.einsum("bi,eoi->bo", x, self.up_proj)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.scale = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x):
        return self.experts(x)


def namespace(folder):
    """What the calls may name."""
    names = {name: getattr(peft, name) for name in peft.__all__}
    names |= dict(os=os, json=json, shutil=shutil, torch=torch, nn=nn, peft=peft, tmp=str(folder))
    names |= dict(mlp=mlp, emb_linear=emb_linear, conv=conv, ln=ln, rnn=rnn, stack=stack, mha=Attention, moe=Mixture)
    names |= dict(llama=tiny_models.llama, opt=tiny_models.opt, bert_cls=tiny_models.bert)
    names |= dict(x=torch.randn(4, 16), ids={"input_ids": tiny_models.tokens(2)})
    get_peft_model = peft.get_peft_model

    def config(**fields):
        return peft.LoraConfig(**{"target_modules": ["lin0", "lin1"], "r": 4, **fields})

    def lora(**fields):
        return get_peft_model(mlp(), config(**fields))

    def two(first=None, second=None):
        model = get_peft_model(mlp(), first or config(), adapter_name="a")
        model.add_adapter("b", second or config())
        return model

    def saved(cfg=None, model=None, name="s"):
        get_peft_model(model or mlp(), cfg or config()).save_pretrained(folder / name)
        return str(folder / name)

    return names | dict(L=config, lora=lora, two=two, saved=saved)


def missing_names(call, names):
    """What a call needs that is not there yet."""
    tree = list(ast.walk(ast.parse(call)))
    missing = set()
    for node in tree:
        if isinstance(node, ast.ImportFrom):
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError:
                module = None
            missing |= {alias.name for alias in node.names if not hasattr(module, alias.name)}
    known = set(names) | set(dir(builtins))
    known |= {node.id for node in tree if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    known |= {alias.name for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names}
    return missing | {node.id for node in tree if isinstance(node, ast.Name)} - known


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_mistakes(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = namespace(tmp_path)
    missing = missing_names(case["call"], names)
    if missing:
        pytest.skip(f"not there yet: {', '.join(sorted(missing))}")
    if "raises" not in case or case["id"] in WORKS_HERE:
        exec(case["call"], names)
        return
    with pytest.raises(Exception) as raised:
        exec(case["call"], names)
    assert {kind.__name__ for kind in type(raised.value).__mro__} & set(case["raises"]), repr(raised.value)
    message = str(raised.value).lower()
    assert [word for word in case.get("words", ()) if word not in message] == [], message


def test_the_lists_name_cases():
    ids = {case["id"] for case in CASES}
    assert ids >= WORKS_HERE
    assert len(ids) == len(CASES)


class HalfCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def lora(model, *targets):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: lora(mlp(), "lin0", "nope"),
        lambda: lora(mlp(), "lin0").unmerge_adapter(),
        lambda: lora(mlp(), "lin0").base_model.merge_adapter(["zzz"]),
        lambda: peft.LoraConfig.from_peft_type(peft_type="LORA", nope=1),
        lambda: lora(HalfCalled(), "used", "unused").eval()(torch.ones(1, 4)),  # by way of torch
    ],
)
def test_warnings_name_the_line_that_called(call):
    with pytest.warns(peft.PeftWarning) as caught:
        call()
    assert {warning.filename for warning in caught} == {__file__}
