"""Methods under torch.compile: one graph, forward and backward, with one adapter and with two at once."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, get_peft_model
from peft.registry import METHODS
from test_conformance import SETTINGS, SUPPORTED, over
from tiny_models import llama, tokens

#: draw anew in each pass, so that two passes differ
RANDOM = {"POLY", "PVERA"}
LEFT_OUT = RANDOM | {"TRAINABLE_TOKENS", "LORA MonteCLoRA"}
NAMES = sorted({method for method, kind in SUPPORTED if kind == "Linear"} - LEFT_OUT)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.target, self.act, self.other = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.act(self.target(x)))


def config_of(method: str, **more) -> peft.PeftConfig:
    fields = {**copy.deepcopy(SETTINGS.get(method, {})), **more}
    return METHODS[method.split()[0]].config_class(target_modules=["target"], **fields)


@contextmanager
def nothing():
    yield


def within_a_context(x: torch.Tensor) -> torch.Tensor:
    with nothing():
        return x + 1


@pytest.fixture(scope="module")
def traces_contexts():
    """Skips where torch (2.4) takes a context manager of Python for the end of a graph."""
    try:
        torch.compile(within_a_context, fullgraph=True, backend="eager")(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this version of torch breaks the graph at each context manager")


@over("method", NAMES)
@pytest.mark.usefixtures("traces_contexts")
def test_one_graph_forward_and_backward_with_one_adapter_and_with_two(method):
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), config_of(method), "a")
        further = {"inference_mode": True} if method == "ADALORA" else {}
        model.add_adapter("b", config_of(method, **further))
    for name, parameter in model.named_parameters():
        if (".a" in name or ".b" in name) and parameter.is_floating_point() and "base_layer" not in name:
            nn.init.normal_(parameter, std=0.1)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(4, 64)
    for active in ("a", ["a", "b"]):
        model.base_model.set_adapter(active)
        expected, got = model(x), compiled(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        gradients = []
        for output in (expected, got):
            model.zero_grad()
            output.square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert gradients[0]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="counts compilations as torch 2.6 can")
def test_an_adapter_that_was_active_before_is_not_compiled_anew():
    torch._dynamo.reset()
    config = LoraConfig(r=2, target_modules=["target"])
    model = get_peft_model(Net(), config, "a")
    model.add_adapter("b", config)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(4, 64)
    for name in ("a", "b"):
        model.set_adapter(name)
        compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("a", "b", "a"):
            model.set_adapter(name)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("method", ["LORA", "LORA DoRA", "IA3", "LOKR", "VERA"])
def test_a_sharded_weight_gives_what_a_whole_one_gives(method, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    tensor = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(tensor, "DTensor"):
        pytest.skip("DTensor is public from torch 2.5 on")
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        outputs = []
        for sharded in (False, True):
            torch.manual_seed(0)
            model = get_peft_model(Net(), config_of(method)).eval()
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.1)
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
            if sharded:
                distribute_module(model, mesh)
                x = DTensor.from_local(x, mesh, [Replicate()])
            y = model(x)
            y.square().sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in (y, *gradients)]
            outputs.append(whole)
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("traces_contexts")
def test_a_penalty_on_the_loss_is_in_the_graph():
    model = get_peft_model(llama(), peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10)).train()
    batch = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
