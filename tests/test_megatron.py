"""LoRA on Megatron's parallel layers, in two processes: what it does is what a LoRA on whole layers does.

The tests run with megatron-core where it is installed, and with a stand-in for its layers (`standins/`), which is real
in all that matters here: two processes, each with its part of a weight.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megatron_runs as runs
from peft import LoraConfig, get_peft_model

STANDIN = str(Path(__file__).parent / "standins")
INSTALLED = importlib.util.find_spec("megatron") is not None


@pytest.fixture(scope="module", params=["stand-in", pytest.param("megatron-core", marks=pytest.mark.slow)])
def seen(request, tmp_path_factory) -> list[dict[Any, Any]]:
    """What each of the processes has seen."""
    if request.param == "megatron-core" and not INSTALLED:
        pytest.skip("megatron-core is not installed")
    folder = tmp_path_factory.mktemp("processes")
    path = [STANDIN] if request.param == "stand-in" else []
    torch.multiprocessing.spawn(runs.run, args=(str(folder), path), nprocs=runs.PROCESSES)
    return [torch.load(folder / f"seen-{rank}.pt", weights_only=True) for rank in range(runs.PROCESSES)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    """The same, of whole layers in one process."""
    return runs.observe(runs.whole, tmp_path_factory.mktemp("alone"))


def assert_same(what: str, parts: list[Any], expected: Any, **tolerance: float) -> None:
    if isinstance(expected, dict):
        assert all(part.keys() == expected.keys() for part in parts)
        for name, value in expected.items():
            assert_same(name, [part[name] for part in parts], value, **tolerance)
    else:
        torch.testing.assert_close(runs.joined(what, parts), expected, **tolerance)


over_forms = pytest.mark.parametrize("gather", [False, True], ids=["parts between the layers", "gathered between"])


@over_forms
@pytest.mark.parametrize(
    "what",
    ["start", "output", "gradient of x", "gradients", "trained", "loaded", "from meta", "merged", "merged weights",
     "disabled", "two", "sum", "alone", "merged for good"],
)  # fmt: skip
def test_it_does_what_it_does_on_whole_layers(seen, alone, gather, what):
    assert_same(what, [process[gather][what] for process in seen], alone[what], rtol=1e-4, atol=1e-5)


@over_forms
def test_half_precision(seen, alone, gather):
    assert_same("bf16", [process[gather]["bf16"] for process in seen], alone["bf16"], rtol=3e-2, atol=3e-2)
    assert_same("autocast", [process[gather]["autocast"] for process in seen], alone["autocast"], rtol=3e-2, atol=3e-2)


@over_forms
def test_unmerging_brings_back_the_bits(seen, gather):
    assert all(process[gather]["unmerged"] for process in seen)


@over_forms
def test_each_sample_of_a_batch_with_an_adapter_of_its_own(seen, alone, gather):
    outputs = alone["alone"]["other"], alone["disabled"], alone["alone"]["default"]
    expected = torch.stack([output[:, sample] for sample, output in enumerate(outputs)], dim=1)
    assert_same("mixed", [process[gather]["mixed"] for process in seen], expected, rtol=1e-4, atol=1e-5)


@over_forms
def test_with_dropout_the_processes_stay_together(seen, alone, gather):
    for name, value in alone["with dropout"].items():
        trained = runs.joined(name, [process[gather]["with dropout"][name] for process in seen])
        assert trained.shape == value.shape and not torch.equal(trained, value)


def test_the_tensors_in_the_state_dict(seen):
    shapes = {name: tuple(tensor.shape) for name, tensor in seen[0][False]["start"].items()}
    assert shapes == {
        "base_model.model.up.lora_A.weight": (4, 8),
        "base_model.model.up.lora_B.weight": (6, 4),
        "base_model.model.down.lora_A.weight": (4, 6),
        "base_model.model.down.lora_B.weight": (8, 4),
    }


def test_sequence_parallelism(seen, alone):
    """Each process has the gradients of its tokens for what all of them hold, and Megatron's mark to sum them up."""
    runs_ = [process["sequence"] for process in seen]
    model = runs.adapted(runs.whole)
    x = runs.tensors()["x"].requires_grad_()
    output = model(x)
    output.square().sum().backward()
    close = dict(rtol=1e-4, atol=1e-5)
    for what in ("output", "with room"):
        torch.testing.assert_close(torch.cat([run[what] for run in runs_]), output, **close)
    torch.testing.assert_close(torch.cat([run["gradient of x"] for run in runs_]), x.grad, **close)
    up_a, up_b, down_a, down_b = (name for name, p in model.named_parameters() if p.requires_grad)
    assert all(run["of own tokens"] == [up_a, down_b] and run["shared out"] == [up_b, down_a] for run in runs_)
    for name in (up_a, up_b, down_a, down_b):
        parts = [run["gradients"][name] for run in runs_]
        found: Tensor = sum(parts) if name in (up_a, down_b) else runs.joined(name, parts)  # type: ignore[assignment]
        torch.testing.assert_close(found, model.get_parameter(name).grad, **close)


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "no config": "ValueError.*'up', a ColumnParallelLinear of Megatron, needs megatron_config",
        "other config": "ValueError.*layers",
        "object": "ValueError.*params_dtype",
        "sequence": "ValueError.*sequence_parallel=True.*sequence_parallel=False",
        "pissa": "ValueError.*pissa.*ParallelLinear",
        "dora": "ValueError.*use_dora.*megatron_config",
        "bias": "ValueError.*lora_bias",
        "expert": "ValueError.*expert that 2 processes share",
        "engine": "ValueError.*TEColumnParallelLinear, which is not supported",
        "svd": "ValueError.*'linear' and 'cat'",
        "convert": "TypeError.*ParallelLinear",
        "ia3": "ValueError.*ColumnParallelLinear",
    }.items(),
)
def test_what_cannot_be_done_is_said(seen, what, words):
    assert re.search(words, seen[0]["errors"][what], re.DOTALL), seen[0]["errors"][what]


@pytest.mark.skipif(INSTALLED, reason="megatron-core is installed")
def test_without_megatron_the_error_names_it():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ImportError, match="Install megatron-core"):
        get_peft_model(model, LoraConfig(target_modules=["0"], megatron_config=runs.SETTINGS))
    assert type(model[0]) is nn.Linear


def test_only_megatron_is_imported():
    config = LoraConfig(target_modules=["0"], megatron_config=runs.SETTINGS, megatron_core="antigravity")
    with pytest.raises(ValueError, match="antigravity"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)


def test_the_path_that_others_import():
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    assert issubclass(LoraParallelLinear, nn.Module)
