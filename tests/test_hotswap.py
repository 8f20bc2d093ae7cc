"""A saved LoRA put in the place of one that is loaded, without compiling anew."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft.utils import load_peft_weights
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from torch import Tensor, nn

from peft import HRAConfig, IA3Config, LoraConfig, PeftModel, PeftWarning, get_peft_model, inject_adapter_in_model
from peft.core.slots import Slot

TARGETS = ["embed", "attention", "linear", "conv", "grouped"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.grouped(self.conv(self.linear(x).mT)).mT)


class Tokens(nn.Module):
    """A model whose embedding is found by the way of transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embed_tokens(tokens))


TOKENS = torch.arange(12).view(2, 6)


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **settings})


@pytest.fixture
def saved(tmp_path):
    """Saves an adapter with random values, made anew from its settings; gives the folder."""
    count = iter(range(100))

    def save(config=None, base=Net, **settings) -> str:
        number = next(count)
        model = get_peft_model(base(), config or lora(**settings))
        torch.manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / str(number))
        return str(tmp_path / str(number))

    return save


def loaded(folder) -> PeftModel:
    return PeftModel.from_pretrained(Net(), folder).eval()


@torch.no_grad()
def output(model) -> Tensor:
    return model(TOKENS)


ADAPTERS = {
    "same": {},
    "scale": {"lora_alpha": 2},
    "lower rank": {"r": 2},
    "higher rank": {"r": 8, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"linear": 2, "attention": 3}, "alpha_pattern": {"conv": 9}},
    "fewer layers": {"target_modules": ["linear", "grouped"]},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_the_model_is_as_if_the_new_adapter_had_been_loaded(settings, saved, tmp_path):
    new = saved(**settings)
    model = loaded(saved())
    before = output(model)
    hotswap_adapter(model, new, "default")
    expected = output(loaded(new))
    torch.testing.assert_close(output(model), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, expected)
    # What is saved then is the new adapter (huggingface/peft writes its tensors with the scale of the old one).
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(output(loaded(tmp_path / "again")), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_inside_of_others_is_replaced(saved):
    model = get_peft_model(Net(), lora(target_modules=["linear"]), "one", mixed=True)
    model.add_adapter("two", HRAConfig(r=2, target_modules=["linear"]))
    folder = saved(target_modules=["linear"])
    hotswap_adapter(model, folder, "one")
    model.set_adapter("one")
    torch.testing.assert_close(model.eval()(TOKENS), PeftModel.from_pretrained(Net(), folder).eval()(TOKENS))


def test_making_room_changes_nothing(saved, tmp_path):
    model = loaded(saved(rank_pattern={"linear": 2}))
    before = output(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(output(model), before)
    assert model.base_model.model.linear.lora_A["default"].out_features == 8
    assert model.base_model.model.grouped.lora_A["default"].out_channels == 8
    model.save_pretrained(tmp_path / "padded")
    torch.testing.assert_close(output(loaded(tmp_path / "padded")), before)


def test_scales_can_still_be_set(saved):
    model = loaded(saved())
    half = {"linear": model.base_model.model.linear.scaling["default"] / 2}
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layer = model.base_model.model.linear
    held = layer.scaling["default"]
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] is held and held.item() == half["linear"]
    layer.unscale_layer()
    assert layer.scaling["default"] is held and held.item() == 2 * half["linear"]


newer_torch = pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.4 fails where it traces descriptors")


@newer_torch
@pytest.mark.parametrize("targets", [["linear"], ["conv", "grouped"], ["embed"], TARGETS], ids=str)
def test_nothing_is_compiled_anew(targets, saved):
    folders = [
        saved(target_modules=targets),
        saved(target_modules=targets, r=2, lora_alpha=1),
        saved(target_modules=targets, r=8, lora_alpha=20),
        saved(target_modules=targets[:1], rank_pattern={targets[0]: 6}),
    ]
    expected = [output(loaded(folder)) for folder in folders]
    model = loaded(folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(output(compiled), expected[0], atol=1e-5, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for folder, wanted in zip(folders[1:], expected[1:], strict=True):
            hotswap_adapter(compiled, folder, "default")
            torch.testing.assert_close(output(compiled), wanted, atol=1e-5, rtol=1e-4)


@newer_torch
def test_without_preparation_a_new_scale_is_compiled_anew(saved):
    """So the test above can fail."""
    model = loaded(saved())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    output(compiled)
    hotswap_adapter(compiled, saved(lora_alpha=1), "default")
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match=r"[Rr]ecompil"):
        output(compiled)


def test_modules_trained_in_full_are_swapped_too(saved):
    new = saved(modules_to_save=["head"])
    model = loaded(saved(modules_to_save=["head"]))
    hotswap_adapter(model, new, "default")
    torch.testing.assert_close(output(model), output(loaded(new)), atol=1e-5, rtol=1e-4)


def test_biases_are_swapped_too(saved):
    settings = {"lora_bias": True, "target_modules": ["linear", "conv"]}
    new = saved(**settings)
    model = loaded(saved(**settings))
    hotswap_adapter(model, new, "default")
    torch.testing.assert_close(output(model), output(loaded(new)), atol=1e-5, rtol=1e-4)


def test_tensors_beside_the_factors_are_swapped_as_they_are(saved):
    """Variants of LoRA have such; a layer that the new adapter has none for cannot do without."""
    model = loaded(saved(target_modules=["linear"]))
    layer = model.base_model.model.linear
    layer.add_slot("lora_magnitude", Slot())
    layer.lora_magnitude["default"] = torch.ones(12)
    tensors = load_peft_weights(saved(target_modules=["linear"]))
    key = "base_model.model.linear.lora_magnitude"
    for wrong in (tensors, {}, {**tensors, key: torch.zeros(3)}):
        unchanged_after(
            model,
            lambda wrong=wrong: hotswap_adapter_from_state_dict(model, wrong, "default", lora()),
            RuntimeError,
            "lora_magnitude",
        )
    hotswap_adapter_from_state_dict(model, {**tensors, key: torch.full((12,), 3.0)}, "default", lora())
    assert layer.lora_magnitude["default"].tolist() == [3.0] * 12


def test_embeddings_saved_along_are_swapped_too(saved):
    """As loading the adapter would do."""
    new = saved(target_modules=["embed_tokens", "linear"], base=Tokens)
    model = PeftModel.from_pretrained(Tokens(), saved(target_modules=["embed_tokens", "linear"], base=Tokens)).eval()
    tensors = load_peft_weights(new)
    key = "base_model.model.embed_tokens.base_layer.weight"
    assert key in tensors
    tensors[key] += 1
    hotswap_adapter_from_state_dict(model, tensors, "default", lora())
    assert torch.equal(model.base_model.model.embed_tokens.base_layer.weight, tensors[key])


@pytest.mark.parametrize("with_name", [False, True])
def test_tensors_by_either_name(with_name, saved):
    """diffusers gives them with the adapter's name in them, on models without a `PeftModel` around."""
    new = saved(target_modules=["linear"], lora_alpha=2)
    model = inject_adapter_in_model(lora(target_modules=["linear"]), Net(), adapter_name="x").eval()
    tensors = {key.removeprefix("base_model.model."): value for key, value in load_peft_weights(new).items()}
    if with_name:
        tensors = {key.replace(".weight", ".x.weight"): value for key, value in tensors.items()}
    hotswap_adapter_from_state_dict(model, tensors, "x", LoraConfig(r=4, lora_alpha=2))
    torch.testing.assert_close(output(model), output(loaded(new)), atol=1e-5, rtol=1e-4)


def unchanged_after(model: nn.Module, call, error: type[Exception], words: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shown = output(model)
    with pytest.raises(error, match=words):
        call()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(output(model), shown)


REFUSED = {
    "more layers": ({"target_modules": [*TARGETS, "head"]}, RuntimeError, "[Uu]nexpected keys: .*head"),
    "other scaling": ({"use_rslora": True}, ValueError, "use_rslora"),
    "dropout": ({"lora_dropout": 0.5}, ValueError, "lora_dropout"),
    "trained biases": ({"bias": "all"}, ValueError, "bias"),
    "another head": ({"modules_to_save": ["head"]}, RuntimeError, "[Uu]nexpected keys"),
    "biases": ({"lora_bias": True, "target_modules": ["linear"]}, RuntimeError, "[Uu]nexpected keys: .*bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_changes(case, saved):
    settings, error, words = REFUSED[case]
    new, model = saved(**settings), loaded(saved())
    unchanged_after(model, lambda: hotswap_adapter(model, new, "default"), error, words)


def test_a_missing_head_is_refused(saved):
    new, model = saved(), loaded(saved(modules_to_save=["head"]))
    unchanged_after(model, lambda: hotswap_adapter(model, new, "default"), RuntimeError, "[Mm]issing keys: .*head")


def test_other_shapes_are_refused(saved):
    model = loaded(saved(target_modules=["linear", "conv"]))
    tensors = load_peft_weights(saved(target_modules=["linear", "conv"]))
    tensors["base_model.model.conv.lora_A.weight"] = torch.zeros(4, 12, 5)
    unchanged_after(
        model,
        lambda: hotswap_adapter_from_state_dict(model, tensors, "default", lora()),
        RuntimeError,
        "does not fit",
    )


def test_merged_adapters_are_refused(saved):
    model = loaded(saved(target_modules=["linear"]))
    model.merge_adapter()
    new = saved(target_modules=["linear"])
    unchanged_after(model, lambda: hotswap_adapter(model, new, "default"), ValueError, "unmerge_adapter")


def test_a_compiled_model_without_room_is_refused(saved):
    model = loaded(saved())
    compiled = torch.compile(model, backend="eager")
    new = saved(r=8)
    unchanged_after(
        model, lambda: hotswap_adapter(compiled, new, "default"), ValueError, "prepare_model_for_compiled_hotswap"
    )


def test_unknown_adapters_and_other_methods(saved):
    model = loaded(saved())
    with pytest.raises(KeyError, match="zzz"):
        hotswap_adapter(model, saved(), "zzz")
    ia3 = IA3Config(target_modules=["linear"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"LORA and IA3"):
        check_hotswap_configs_compatible(lora(), ia3)
    with pytest.raises(ValueError, match=r"LORA .*IA3"):
        check_hotswap_configs_compatible(ia3, ia3)


def test_preparing_is_checked_before_anything_changes(saved):
    model = loaded(saved(rank_pattern={"conv": 6}))
    for rank, words in ((4, "lower .*conv"), (7, "multiple of the groups")):
        unchanged_after(
            model, lambda rank=rank: prepare_model_for_compiled_hotswap(model, target_rank=rank), ValueError, words
        )
    with pytest.raises(ValueError, match="no LoRA"):
        prepare_model_for_compiled_hotswap(Net())
    with pytest.raises(ValueError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(model, check_compiled="maybe")


def test_preparing_a_compiled_model(saved):
    compiled = torch.compile(loaded(saved()), backend="eager")
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(PeftWarning, match="before"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="ignore")


def test_configurations_given_get_the_rank(saved):
    configs = {"x": lora(rank_pattern={"linear": 2})}
    prepare_model_for_compiled_hotswap(loaded(saved()), target_rank=8, config=configs)
    assert configs["x"].r == 8 and configs["x"].rank_pattern == {"linear": 8}
