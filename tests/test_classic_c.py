"""FourierFT, VB-LoRA, RandLoRA, AdaLoRA: what the conformance test and the golden cases leave open."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft

torch.set_num_threads(1)


class TwoLayers(nn.Module):
    def __init__(self, inner: int = 12):
        super().__init__()
        self.first, self.second = nn.Linear(8, inner), nn.Linear(inner, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def build(**sizes) -> TwoLayers:
    torch.manual_seed(1)
    return TwoLayers(**sizes).eval()


TARGETS = {"target_modules": ["first", "second"]}


def outcomes(model, x):
    """Output and gradients of x and of all that is trained."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x = x.clone().requires_grad_()
    output = model(x)
    gradients = torch.autograd.grad(output.square().sum(), [x, *trained.values()])
    return {"output": output, **dict(zip(["x", *trained], gradients, strict=True))}


# ---- FourierFT


def test_fourierft_computes_the_same_by_waves_and_by_weight(monkeypatch):
    from peft.tuners.fourierft import FourierFTLayer

    model = peft.get_peft_model(build(), peft.FourierFTConfig(n_frequency=30, scaling=20.0, **TARGETS))
    x = torch.randn(2, 3, 8)
    ways = []
    for by_weight in (False, True):
        monkeypatch.setattr(FourierFTLayer, "prefers_weight", lambda self, name, rows, by_weight=by_weight: by_weight)
        ways.append(outcomes(model, x))
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-4, atol=1e-4)


def test_fourierft_takes_waves_for_few_vectors_and_the_weight_for_many():
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(256, 256)), peft.FourierFTConfig(target_modules=["0"])
    ).base_model.model[0]
    assert not layer.prefers_weight("default", 1)
    assert layer.prefers_weight("default", 1024)


def test_fourierft_keeps_its_places_out_of_the_state_dict():
    model = peft.get_peft_model(build(), peft.FourierFTConfig(n_frequency=5, **TARGETS))
    assert not [key for key in model.state_dict() if "frequencies" in key]
    assert model.base_model.model.first.fourierft_frequencies["default"].shape == (2, 5)


def test_fourierft_embedding_that_scales_its_output():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    config = peft.FourierFTConfig(target_modules=["0"], n_frequency=9, scaling=20.0)
    model = peft.get_peft_model(nn.Sequential(Scaled(10, 4)), config)
    x = torch.tensor([[1, 2, 9]])
    torch.testing.assert_close(model(x), model.merge_and_unload()(x))


# ---- VB-LoRA


def vblora(**changes) -> peft.PeftModel:
    return peft.get_peft_model(build(), peft.VBLoRAConfig(num_vectors=10, vector_length=2, **TARGETS, **changes))


def test_vblora_saved_with_the_chosen_vectors_alone_cannot_be_trained(tmp_path):
    model, x = vblora(save_only_topk_weights=True), torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        loaded.train()(x)
    frozen = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(frozen.train()(x), model(x))
    assert frozen.merge_and_unload()(x).isfinite().all()


@pytest.mark.parametrize("only_topk", [False, True])
def test_vblora_says_how_much_it_saves(tmp_path, only_topk, capsys):
    model = vblora(save_only_topk_weights=only_topk, bias="all")
    own, others = model.get_nb_savable_parameters()
    model.save_pretrained(tmp_path)
    saved = {key: value.nbytes for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert own == sum(size for key, size in saved.items() if "vblora" in key) // 4
    assert others == 8 + 12
    model.print_savable_parameters()
    assert f"{own:,d}" in capsys.readouterr().out


def test_vblora_layers_share_one_bank():
    model = vblora()
    banks = [
        layer.vblora_vector_bank["default"] for layer in (model.base_model.model.first, model.base_model.model.second)
    ]
    assert banks[0] is banks[1] is model.base_model.vblora_vector_bank["default"]
    assert sum("vector_bank" in name for name, _ in model.named_parameters()) == 1
