"""The `peft` command on base models that are stored in few bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from peft import LoraConfig, PeftModel
from peft.cli import main
from test_cli_commands import base_of, logits, save_adapter, words
from tiny_models import byte_tokenizer, llama


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory) -> SimpleNamespace:
    """A base model that is stored in 4 bits, and a LoRA for it."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("four")
    files = SimpleNamespace(**{name: folder / name for name in ("whole", "base", "lora")})
    for path in (files.whole, files.base):
        byte_tokenizer().save_pretrained(path)
    llama(vocab_size=259, hidden_size=64, intermediate_size=128).save_pretrained(files.whole)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    # transformers 4.57 would take half precision
    settings = {"quantization_config": bits, "device_map": {"": "cpu"}, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(files.whole, **settings)
    model.save_pretrained(files.base)
    save_adapter(files.base, files.lora, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), seed=1)
    return files


def test_of_a_base_in_4_bits_a_whole_model_is_merged(four_bits, tmp_path, capsys):
    assert main(words("merge", four_bits.lora, "--output", tmp_path / "merged")) == 0
    merged = base_of(tmp_path / "merged")
    weights = merged.state_dict()
    assert {name: t.shape for name, t in weights.items()} == {
        name: t.shape for name, t in base_of(four_bits.whole).state_dict().items()
    }
    base = base_of(four_bits.base, dtype=torch.float32).dequantize()
    adapted = PeftModel.from_pretrained(base, four_bits.lora)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-3)
    assert main(words("merge", four_bits.lora, "--by-shard", "--output", tmp_path / "shards")) == 2
    assert "are quantised; they are merged in memory" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_no_gradient_through_a_quantised_base_is_an_error(four_bits, tmp_path, monkeypatch, capsys):
    """As on CPUs, where a kernel in 4 bits has no backward pass and leaves zeros."""
    from peft.cli.watch import Watch

    def without(self, *args, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
        check(self, *args, model=model, **kwargs)

    check = Watch.on_pre_optimizer_step
    monkeypatch.setattr(Watch, "on_pre_optimizer_step", without)
    (tmp_path / "text.txt").write_text("some words to learn " * 20)
    few = ("--max-steps", 1, "--eval-split", 0, "--device", "cpu", "--output", tmp_path / "run", "--max-length", 32)
    assert main(words("train", "--model", four_bits.base, "--data", tmp_path / "text.txt", *few)) == 1
    assert "adapter tensors got no gradient in the first step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
