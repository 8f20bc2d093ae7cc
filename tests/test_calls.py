"""Facts of one call: each call sees its own, in threads, under checkpointing, in training and in mixed models."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import peft
from peft import LoraConfig, get_peft_model
from peft.core.call import current
from tiny_models import llama as tiny_llama
from tiny_models import tokens


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "hra_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(torch.relu(self.q_proj(x)))


def three_loras(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **settings), "a")
    for name in ("b", "c"):
        model.add_adapter(name, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, **settings))
    return randomised(model)


NAMES = ["a", "__base__", "b", "c", "a", "b"]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize("samples", [6, 96])
def test_a_mixed_batch_trains_each_adapter_on_its_own_samples(settings, samples):
    model, names = three_loras(**settings).train(), NAMES * (samples // 6)
    x = torch.randn(samples, 3, 8)
    for name in "abc":
        model.base_model.set_requires_grad(name, True)
    model(x, adapter_names=names).square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for name in ("a", "b", "c"):
        model.set_adapter(name)
        model(x[[i for i, other in enumerate(names) if other == name]]).square().sum().backward()
        for key, parameter in model.named_parameters():
            if f".{name}." in key and parameter.requires_grad:
                torch.testing.assert_close(mixed[key], parameter.grad, rtol=1e-4, atol=1e-4)
        model.zero_grad()


def test_two_threads_with_different_adapters_on_one_model():
    model = three_loras().eval()
    x, expected, wrong = torch.randn(4, 8), {}, []
    for name in "abc":
        model.set_adapter(name)
        expected[name] = model(x)

    def work(name: str) -> None:
        for _ in range(200):
            with torch.no_grad():
                if not torch.allclose(model(x, adapter_names=[name] * 4), expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abca"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and current() is None


def _losses(model: nn.Module, calls: list[dict]) -> torch.Tensor:
    return sum(model(**call).logits.square().mean() for call in calls)


POLY = dict(target_modules=["q_proj", "v_proj"], r=2, n_tasks=3, n_skills=2, init_weights=False)


@pytest.mark.parametrize("kind", ["poly", "alora", "mixed batch"])
def test_two_forward_passes_before_one_backward_pass_under_checkpointing(kind):
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        base, ids = tiny_llama(), torch.arange(24).view(2, 12) % 30
        if kind == "poly":
            model = get_peft_model(base, peft.PolyConfig(**POLY))
            facts = [{"task_ids": torch.tensor([0, 1])}, {"task_ids": torch.tensor([2, 2])}]
        elif kind == "alora":
            tokens = dict(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
            model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **tokens))
            facts = [{}, {}]
        else:
            config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
            model = get_peft_model(base, config)
            model.add_adapter("other", config)
            model.base_model.set_requires_grad("other", True)
            facts = [{"adapter_names": ["default", "other"]}, {"adapter_names": ["other", "__base__"]}]
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        calls = [{"input_ids": ids, **facts[0]}, {"input_ids": ids.flip(1) if kind == "alora" else ids + 1, **facts[1]}]
        torch.manual_seed(0)
        _losses(model, calls).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*grads, strict=True))
    assert any(grad.abs().sum() > 0 for grad in grads[0])


# ---- methods in a mixed model


def test_biases_of_one_method_are_trained_on_its_own_layers_only():
    config = LoraConfig(target_modules=["q_proj"], bias="lora_only")
    model = get_peft_model(Net(), config, "lora", mixed=True)
    model.add_adapter("hra", peft.HRAConfig(target_modules=["v_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert trained == {"base_model.model.q_proj.base_layer.bias"}


def test_alora_acts_in_a_mixed_model():
    settings = dict(target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    ids = torch.tensor([[1, 2, 5, 6, 3], [1, 2, 3, 4, 7]])
    outputs = []
    for mixed in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(**settings, **({} if mixed else {"task_type": "CAUSAL_LM"}))
        model = get_peft_model(tiny_llama(), config, "alora", mixed=mixed).eval()
        randomised(model)
        outputs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*outputs)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert not torch.allclose(base[0], outputs[1][0], atol=1e-3) and torch.allclose(base[1], outputs[1][1], atol=1e-6)


def test_adapters_with_the_same_invocation_are_combined():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6]))
    model.add_adapter("c", LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[7]))
    randomised(model)
    ids = torch.tensor([[1, 2, 5, 6, 3], [1, 2, 3, 4, 7]])
    model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "both", combination_type="cat")
    outputs = []
    for name in ("a", "both"):
        model.set_adapter(name)
        outputs.append(model.eval()(input_ids=ids).logits)
    torch.testing.assert_close(*outputs)
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "others", combination_type="cat")


SCHEDULE = dict(total_step=20, tinit=1, tfinal=1, deltaT=1, target_r=1)


def test_adalora_in_a_mixed_model_has_its_penalty_and_its_schedule():
    model = get_peft_model(tiny_llama(), peft.AdaLoraConfig(target_modules=["q_proj"], **SCHEDULE), "ada", mixed=True)
    model.add_adapter("hra", peft.HRAConfig(target_modules=["v_proj"]))
    ids = torch.arange(8)[None]
    loss = model(input_ids=ids, labels=ids).loss
    plain = nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:])
    assert loss > plain + 1e-3
    loss.backward()
    model.base_model.update_and_allocate(5)
    assert any(False in kept for kept in model.peft_config["ada"].rank_pattern.values())
    model.add_adapter("other", peft.AdaLoraConfig(target_modules=["k_proj"], **SCHEDULE))
    model.set_adapter(["ada", "other"])
    both = model(input_ids=ids, labels=ids).loss
    both.backward()
    model.base_model.update_and_allocate(5)
    assert both > loss + 1e-3 and any(False in kept for kept in model.peft_config["other"].rank_pattern.values())
    model.delete_adapter("other")
    again = peft.AdaLoraConfig(target_modules=["k_proj"], **SCHEDULE)
    model.add_adapter("other", again)
    assert model.base_model.rankallocator.peft_config is again, "one of the same name begins anew"


def test_the_base_model_and_mixed_batches_from_several_threads():
    """Each thread that has disabled the adapters sees the base model until it leaves, whoever leaves before."""
    model = three_loras().eval()
    x, wrong = torch.randn(4, 8), []
    expected = model(x)
    with model.disable_adapter():
        base = model(x)
    first_inside, second_inside, first_left = (threading.Event() for _ in range(3))

    def first() -> None:
        with model.disable_adapter():
            first_inside.set()
            second_inside.wait(30)
        first_left.set()

    def second() -> None:
        first_inside.wait(30)
        with model.disable_adapter():
            second_inside.set()
            first_left.wait(30)
            if not torch.equal(model(x), base):
                wrong.append("second")

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x, adapter_names=["__base__"] * 4), base)


@pytest.mark.parametrize("kind", ["layers", "prompt"])
def test_whoever_enters_and_leaves_in_whatever_order_the_adapters_act_afterwards(kind):
    if kind == "layers":
        model, x = three_loras().eval(), torch.randn(4, 8)
    else:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        model, x = get_peft_model(tiny_llama(), config).eval(), tokens()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def work() -> None:
            for _ in range(150 if kind == "layers" else 20):
                with model.disable_adapter(), torch.no_grad():
                    model(x)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained != []
    assert model.prompt_active if kind == "prompt" else not model.base_model.disabled


CHANGES = {
    "disabled": lambda model, saved: model.base_model.disable_adapter_layers(),
    "set": lambda model, saved: model.set_adapter("b"),
    "deleted": lambda model, saved: model.delete_adapter("a"),
    "merged": lambda model, saved: model.merge_adapter(["b"]),
    "added": lambda model, saved: model.add_adapter("d", copy.copy(model.peft_config["a"])),
    "loaded": lambda model, saved: model.load_adapter(saved, "d"),
    "loaded over": lambda model, saved: model.load_adapter(saved, "b"),
    "swapped": lambda model, saved: hotswap_adapter(model, saved, "a"),
    "merged for good": lambda model, saved: model.merge_and_unload(adapter_names=["b"]),
    "taken off": lambda model, saved: model.unload(),
}


def test_a_soft_prompt_stays_the_same_until_the_pass_has_ended():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, inputs = get_peft_model(tiny_llama(), config, "a").eval(), {"input_ids": tokens()}
    expected, done = model(**inputs).logits, threading.Event()
    thread = threading.Thread(target=lambda: (model.delete_adapter("a"), done.set()))

    def in_the_middle(module: nn.Module, args: object) -> None:
        if not done.is_set() and not thread.is_alive():
            thread.start()
            done.wait(0.3)

    handle = model.get_base_model().model.norm.register_forward_pre_hook(in_the_middle)
    assert torch.equal(model(**inputs).logits, expected)
    handle.remove()
    thread.join()
    assert done.is_set() and "a" not in model.peft_config


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_in_the_middle_of_a_pass_does_not_wait_for_it():
    model, inside, over = three_loras().eval(), threading.Event(), threading.Event()
    handle = model.base_model.model.v_proj.register_forward_pre_hook(lambda *_: inside.set() or not over.wait() or None)
    thread = threading.Thread(target=lambda: model(torch.randn(4, 8)))
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it where it would wait for ever
        model.set_adapter("b")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    over.set()
    thread.join()
    handle.remove()
    assert status == 0


def test_whoever_waits_long_for_a_pass_is_told_so(monkeypatch):
    monkeypatch.setattr(peft.core.whole, "_PATIENCE", 0.0)
    model, inside, over = three_loras().eval(), threading.Event(), threading.Event()
    model.base_model.model.v_proj.register_forward_pre_hook(lambda *_: inside.set() or not over.wait() or None)
    thread = threading.Thread(target=lambda: model(torch.randn(4, 8)))
    thread.start()
    inside.wait()
    monkeypatch.setattr(peft.core.whole, "warn", lambda message: (said.append(message), over.set()))
    said: list[str] = []
    model.set_adapter("b")
    thread.join()
    assert len(said) == 1 and "not ended" in said[0]


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_that_has_begun_does_not_see_what_another_thread_changes(change, tmp_path):
    model, x = three_loras().eval(), torch.randn(4, 8)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    expected, done = model(x), threading.Event()
    thread = threading.Thread(target=lambda: (CHANGES[change](model, tmp_path / "b"), done.set()))

    def in_the_middle(module: nn.Module, args: object) -> None:
        thread.start()
        assert not done.wait(0.3)

    handle = model.base_model.model.v_proj.register_forward_pre_hook(in_the_middle)
    assert torch.equal(model(x), expected)
    handle.remove()
    thread.join()
    assert done.is_set() and torch.equal(model(x), expected) == (change in ("added", "loaded", "loaded over"))
