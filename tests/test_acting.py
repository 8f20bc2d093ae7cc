"""Adapters act, however the model around uses their module; where they cannot, that is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    MambaConfig,
    MambaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import peft
from peft import LoraConfig, get_peft_model

METHODS = {
    "lora": lambda **more: LoraConfig(r=2, **more),
    "dora": lambda **more: LoraConfig(r=2, use_dora=True, **more),
    "loha": lambda **more: peft.LoHaConfig(r=2, **more),
    "hra": lambda **more: peft.HRAConfig(r=2, **more),
    "ia3": lambda **more: peft.IA3Config(feedforward_modules=[], **more),
}


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ---- weights that are read, fast paths


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)

    def forward(self, x):
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        return self.encoder(x, src_key_padding_mask=padding)[:, :3]


def deberta() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    positions = {"relative_attention": True, "position_buckets": 4, "max_position_embeddings": 16}
    config = DebertaV2Config(vocab_size=40, pos_att_type=["p2c", "c2p"], initializer_range=0.5, **positions, **sizes)
    return DebertaV2Model(config)


def siglip() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return SiglipVisionModel(SiglipVisionConfig(image_size=8, patch_size=4, **sizes))


def mamba() -> nn.Module:
    return MambaModel(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4))


X, IDS, PIXELS = torch.randn(2, 5, 8), torch.tensor([[3, 9, 1, 7], [5, 5, 2, 30]]), torch.randn(2, 3, 8, 8)
READ = {
    "output projection": (Attention, "out_proj", X),
    "encoder layer": (Encoder, "linear1", X),
    "relative embeddings": (deberta, "rel_embeddings", IDS),
    "position embeddings": (siglip, "position_embedding", PIXELS),
    "convolution of a mixer": (mamba, "conv1d", IDS),
}


def result(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", READ)
def test_what_reads_a_weight_sees_the_adapter(case, method):
    make, target, x = READ[case]
    torch.manual_seed(0)
    base = make().eval()
    with torch.no_grad():
        before = result(base, x)
    if case == "convolution of a mixer" and method in ("lora", "dora"):
        # The change of a convolution with groups is none of its weight.
        model = get_peft_model(base, LoraConfig(r=32, target_modules=[target], use_dora=method == "dora"))
        with pytest.raises(NotImplementedError, match="groups"):
            result(model, x)
        return
    model = trained(get_peft_model(base, METHODS[method](target_modules=[target])))
    acting = result(model, x)
    acting.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert (acting - before).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(result(model, x), acting, atol=1e-5, rtol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(result(model, x), before, atol=1e-5, rtol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(result(model, x), acting, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result(model.merge_and_unload(), x), acting, atol=1e-5, rtol=1e-4)


def test_fast_paths_are_as_before_without_adapters():
    base = Encoder().eval()
    layer = base.encoder.layers[0]
    fast = layer.activation_relu_or_gelu
    model = get_peft_model(base, METHODS["lora"](target_modules=["layers.0.linear1"]))
    assert fast and not layer.activation_relu_or_gelu and base.encoder.layers[1].activation_relu_or_gelu == fast
    model.unload()
    assert layer.activation_relu_or_gelu == fast and base.encoder.use_nested_tensor
    with pytest.raises(ValueError):
        get_peft_model(base, METHODS["lora"](target_modules=["linear1", "self_attn", "encoder"]))
    assert layer.activation_relu_or_gelu == fast
