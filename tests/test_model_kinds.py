"""Adapters on models of every modality: whatever transformers has, an adapter is added, trained, saved and loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor, nn

from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import fill_adapter


@dataclass
class Kind:
    """A model of transformers, small, and inputs by name: shapes of random ones, or (count, shape) of token ids."""

    model: str
    targets: list[str] | str
    fields: dict
    inputs: dict

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        return model_class(model_class.config_class(**copy.deepcopy(self.fields))).eval()

    def arguments(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return {
            name: torch.randint(3, shape[0], shape[1]) if isinstance(shape[1], tuple) else torch.randn(shape)
            for name, shape in self.inputs.items()
        }


TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
PICTURE = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
SOUND = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, conv_dim=(16,), conv_kernel=(10,),
    conv_stride=(5,), num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
WAVE = {"input_values": (2, 400)}
RGB = {"pixel_values": (2, 3, 8, 8)}
WORDS = {"input_ids": (40, (2, 5))}
SWIN = dict(
    model_type="swin", image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)  # fmt: skip

KINDS = [
    # sound
    Kind("Wav2Vec2ForCTC", ["q_proj"], {**SOUND, "vocab_size": 40}, WAVE),
    Kind("HubertModel", "all-linear", SOUND, WAVE),
    Kind("WavLMModel", ["output_dense", "projection"], SOUND, WAVE),
    Kind("ASTModel", "all-linear", {**PICTURE, "max_length": 16, "num_mel_bins": 8}, {"input_values": (2, 16, 8)}),
    Kind(
        "SpeechT5ForSpeechToText", ["q_proj", "v_proj"],
        {**SOUND, "vocab_size": 40, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
         "decoder_layers": 1, "decoder_ffn_dim": 16, "decoder_attention_heads": 2, "num_mel_bins": 8},
        {**WAVE, "decoder_input_ids": (40, (2, 5))},
    ),
    # pictures
    Kind("ViTModel", "all-linear", PICTURE, RGB),
    Kind(
        "ResNetModel", ["convolution"],
        dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"), RGB,
    ),
    Kind(
        "ConvNextModel", ["pwconv1", "downsampling_layer.1"],
        dict(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2), RGB,
    ),
    Kind(
        "MobileNetV2Model", r".*(expand|reduce)_1x1\.convolution",
        dict(depth_multiplier=0.25, image_size=32), {"pixel_values": (1, 3, 32, 32)},
    ),
    Kind(
        "SegformerForSemanticSegmentation", "all-linear",
        dict(hidden_sizes=[8, 8], depths=[1, 1], num_encoder_blocks=2, num_attention_heads=[1, 1], sr_ratios=[1, 1],
             patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[1, 1], decoder_hidden_size=8),
        {"pixel_values": (1, 3, 16, 16)},
    ),
    Kind(
        "Mask2FormerModel", ["q_proj", "value_proj"],
        dict(backbone_config=SWIN, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8,
             dim_feedforward=8, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=4),
        {"pixel_values": (2, 3, 32, 32)},
    ),
    Kind("Dinov2Model", "all-linear", PICTURE, RGB),
    # pictures and text
    Kind(
        "CLIPModel", "all-linear", dict(text_config=TEXT, vision_config=PICTURE, projection_dim=16),
        {**WORDS, **RGB},
    ),
    # series
    Kind(
        "PatchTSTForPrediction", "all-linear",
        dict(context_length=16, patch_length=4, num_input_channels=2, d_model=16, ffn_dim=16, num_hidden_layers=1,
             num_attention_heads=2, prediction_length=4),
        {"past_values": (2, 16, 2)},
    ),
    # text
    Kind("MambaForCausalLM", ["x_proj"], dict(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=40), WORDS),
    Kind(
        "DistilBertForTokenClassification", "all-linear",
        dict(dim=16, hidden_dim=16, n_layers=1, n_heads=2, vocab_size=40), WORDS,
    ),
]  # fmt: skip


def tensor_of(output) -> Tensor:
    """The first tensor of floating-point values of an output; Mask2Former's may be the backbone's, without adapters."""
    for value in (output.get("transformer_decoder_last_hidden_state"), *output.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
    raise AssertionError("the model gives no tensor")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model)
def test_an_adapter_is_added_trained_saved_and_loaded(kind, tmp_path):
    inputs = kind.arguments()
    model = get_peft_model(kind.build(), LoraConfig(r=2, target_modules=kind.targets))
    fill_adapter(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensor_of(model(**inputs)).pow(2).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    torch.optim.SGD(trained, lr=0.01).step()
    with torch.no_grad():
        expected = tensor_of(model(**inputs))
        with model.disable_adapter():
            assert not torch.equal(tensor_of(model(**inputs)), expected)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(kind.build(), tmp_path)
        torch.testing.assert_close(tensor_of(loaded(**inputs)), expected)
        torch.testing.assert_close(tensor_of(loaded.merge_and_unload()(**inputs)), expected, rtol=1e-3, atol=1e-4)
