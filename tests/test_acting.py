"""Adapters act, however the model around uses their module; where they cannot, that is said."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    MambaConfig,
    MambaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5Model,
)

import peft
from peft import LoraConfig, get_peft_model
from tiny_models import gpt2, llama, tokens

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
        if transformers.__version__ < "5":
            pytest.skip("the convolution is called there")
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


# ---- weights that are made of others, forwards of a module's own


class Parametrised(nn.Module):
    def __init__(self, kind: str, parametrise):
        super().__init__()
        modules = {"linear": lambda: nn.Linear(6, 6), "conv": lambda: nn.Conv1d(6, 6, 3, padding=1)}
        self.inner = parametrise(modules[kind]())

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_adapters_are_merged_into_weights_of_normed_length(kind, method):
    torch.manual_seed(0)
    base = Parametrised(kind, nn.utils.parametrizations.weight_norm)
    names, x = [*base.state_dict()], torch.randn(2, 6, 6)
    model = trained(get_peft_model(base, METHODS[method](target_modules=["inner"])))
    with model.disable_adapter():
        before = model(x)
    acting = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), acting, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(model(x), acting)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), acting, atol=1e-5, rtol=1e-4)
    assert [*merged.state_dict()] == names


@pytest.mark.parametrize(
    "parametrise",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_cannot_take_a_change_are_not_merged(parametrise):
    model = trained(get_peft_model(Parametrised("linear", parametrise), METHODS["lora"](target_modules=["inner"])))
    x = torch.randn(2, 6)
    acting = model(x)
    with pytest.raises(NotImplementedError, match="merged"):
        model.merge_adapter()
    assert torch.equal(model(x), acting)


class Shifted(nn.Embedding):
    """Rows of other tokens than it is asked for, as OPT's positions."""

    def forward(self, ids):
        return super().forward(ids + 2)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Unchanged(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice, self.plain = Shifted(12, 8), Doubled(8, 8), Unchanged(8, 8)

    def forward(self, ids):
        return self.plain(self.twice(self.table(ids)))


@pytest.mark.parametrize("method", [*METHODS, "miss", "lokr", "vera"])
def test_a_forward_of_its_own_runs_with_the_changed_weight(method):
    torch.manual_seed(0)
    more = {
        "miss": lambda **k: peft.MissConfig(r=2, **k),
        "lokr": lambda **k: peft.LoKrConfig(r=2, **k),
        "vera": lambda **k: peft.VeraConfig(r=2, **k),
    }
    targets = ["twice", "plain"] if method == "vera" else ["table", "twice", "plain"]
    model = trained(get_peft_model(Own(), {**METHODS, **more}[method](target_modules=targets)))
    ids = torch.tensor([[0, 3, 9], [1, 1, 4]])
    acting = model(ids)
    assert acting.requires_grad
    layers = model.base_model.model
    assert not layers.plain.op.own_forward and layers.twice.op.own_forward
    model.merge_adapter()
    torch.testing.assert_close(model(ids), acting, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    mixed = model(ids, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], acting[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], Own.forward(model.unload(), ids)[1], atol=1e-5, rtol=1e-4)


def test_dropout_that_cannot_act_is_refused():
    model = get_peft_model(Own(), LoraConfig(target_modules=["twice"], lora_dropout=0.1)).train()
    with pytest.raises(ValueError, match="Doubled"):
        model(torch.tensor([[0]]))


# ---- mixed batches where the input is not one row a sample


def mixed(model: nn.Module, config) -> nn.Module:
    model = get_peft_model(model, config, "one")
    model.add_adapter("two", config)
    model.set_adapter(["one", "two"])
    trained(model).set_adapter("one")
    return model


@pytest.mark.parametrize("method", METHODS)
def test_positions_that_all_samples_share_are_looked_up_for_each(method):
    model = mixed(gpt2(), METHODS[method](target_modules=["wpe"]))
    ids = tokens(3, 6)
    names = ["two", "__base__", "one"]
    together = model(ids, adapter_names=names).logits
    for place, name in enumerate(names):
        alone = model(ids[place : place + 1], adapter_names=[name]).logits
        torch.testing.assert_close(together[place : place + 1], alone, atol=1e-4, rtol=1e-4)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.relative_attention_bias = nn.Linear(8, 8), nn.Embedding(4, 8)

    def forward(self, x):
        distances = torch.arange(6)[:, None].sub(torch.arange(6)).clamp(0, 3)
        return self.lin(x.transpose(0, 1)).transpose(0, 1) + self.relative_attention_bias(distances).sum(1)


@pytest.mark.parametrize("target", ["lin", "relative_attention_bias"])
def test_rows_that_are_no_samples_are_not_mixed(target):
    model, x = mixed(SequenceFirst(), LoraConfig(r=2, target_modules=[target])), torch.randn(3, 6, 8)
    with pytest.raises(ValueError, match="no row for each sample"):
        model(x, adapter_names=["one", "two", "one"])
    expected = model(x, adapter_names=["two"] * 3)
    model.set_adapter("two")
    torch.testing.assert_close(model(x), expected)


# ---- what is watched in the first passes


class Parts(nn.Module):
    """One layer that is called, one that is not, and one behind which gradients end."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.idle, self.cut = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(x) + self.cut(x).detach()


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_not_called_or_get_no_gradient_are_named_once(method):
    model = get_peft_model(Parts(), METHODS[method](target_modules=["called", "idle", "cut"]))
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match="'idle' were not called") as seen:
        model.eval()(x)
    assert not any("'called'" in str(w.message) for w in seen)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(6):
            model.train()(x).sum().backward()
    said = [str(warning.message) for warning in seen if "no gradient" in str(warning.message)]
    assert len(said) == 1 and "'cut'" in said[0] and "called'" not in said[0]
    assert "_watch" not in model.base_model.__dict__
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_model_that_passes_no_gradient_on_is_named():
    model = get_peft_model(Parts(), LoraConfig(target_modules=["cut"]))
    with pytest.warns(UserWarning, match="'cut' got no gradient"):
        model.train()(torch.randn(2, 8))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_loaded_to_be_trained_and_not_active_is_named_once(method, tmp_path):
    model = get_peft_model(Parts(), METHODS[method](target_modules=["called"], modules_to_save=["cut"]))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    model.load_adapter(tmp_path, "frozen")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            model.train()(torch.randn(2, 8)).sum().backward()
    said = [str(warning.message) for warning in seen if "is not active" in str(warning.message)]
    assert len(said) == 1 and said[0].startswith("'second' can be trained")
    model.set_adapter("second")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(torch.randn(2, 8)).sum().backward()
    assert not any("is not active" in str(warning.message) for warning in seen)


def test_a_model_in_order_is_silent():
    model = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], modules_to_save=["ln_f"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model(tokens()).logits.sum().backward()
    assert "_watch" not in model.base_model.__dict__


def test_a_model_in_order_is_silent_when_all_of_it_is_checkpointed():
    model = get_peft_model(Parts(), LoraConfig(target_modules=["called"])).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.4 warns of what it calls itself
        for _ in range(3):
            checkpoint(model, torch.randn(2, 8), use_reentrant=False).sum().backward()


def test_a_start_that_was_not_made_is_named():
    model = get_peft_model(Parts(), LoraConfig(target_modules=["called"], init_lora_weights="eva"))
    with pytest.warns(UserWarning, match="initialize_lora_eva_weights"):
        model.train()(torch.randn(2, 8))


# ---- modules with several places


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5Model(T5Config(vocab_size=40, initializer_factor=0.3, **sizes)).eval()


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"second": self.first})

    def forward(self, x):
        return self.inner["second"](torch.relu(self.first(x)))


SEVERAL = {
    "an embedding that others are tied to": (t5, "shared", {"input_ids": IDS, "decoder_input_ids": IDS}),
    "the first name": (TwoNames, "first", {"x": torch.randn(2, 8)}),
    "the second name": (TwoNames, "second", {"x": torch.randn(2, 8)}),
    "a pattern for both": (TwoNames, r"first|inner\.second", {"x": torch.randn(2, 8)}),
}


@pytest.mark.parametrize(
    ("case", "method"), [*itertools.product(SEVERAL, METHODS), ("an embedding that others are tied to", "in full")]
)
def test_a_module_has_its_adapter_in_all_its_places(case, method, tmp_path):
    make, target, inputs = SEVERAL[case]

    def run(model):
        y = model(**inputs)
        return y if isinstance(y, torch.Tensor) else y.last_hidden_state

    torch.manual_seed(0)
    base = make()
    names, before = [*base.state_dict()], run(base).detach()
    if method == "in full":
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q"], modules_to_save=[target]))
    else:
        model = get_peft_model(base, METHODS[method](target_modules=target if "|" in target else [target]))
    trained(model)
    acting = run(model)
    acting.square().sum().backward()
    assert (acting - before).abs().max() > 1e-3
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        torch.testing.assert_close(run(model), before, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(make(), tmp_path)), acting)
    copied = copy.deepcopy(model)
    if method != "in full":
        model.merge_adapter()
        torch.testing.assert_close(run(model), acting, atol=1e-4, rtol=1e-3)
        model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), acting, atol=1e-4, rtol=1e-3)
    assert [*merged.state_dict()] == names
    plain = copied.unload()
    torch.testing.assert_close(run(plain), before, atol=1e-6, rtol=1e-6)
    assert [*plain.state_dict()] == names


def _lora_weights(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [parameter for key, parameter in model.named_parameters() if f".{name}." in key]


def _written(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in _lora_weights(model, "b"):
            parameter.mul_(2)


def _replaced(model: nn.Module) -> None:
    for parameter in _lora_weights(model, "b"):
        parameter.data = parameter.data * 2


def _new_module(model: nn.Module) -> None:
    for key, module in model.named_modules():
        if key.endswith("lora_B"):
            module["b"] = copy.deepcopy(module["b"])
            module["b"].weight = nn.Parameter(module["b"].weight.detach() * 2, requires_grad=False)


def _hooked(model: nn.Module) -> None:
    for key, module in model.named_modules():
        if key.endswith("lora_B.b"):
            module.register_forward_hook(lambda module, args, output: output * 2)


def _stepped(model: nn.Module) -> None:
    for parameter in _lora_weights(model, "a"):
        parameter.data.mul_(2)  # as some optimisers do; this adapter is trained


def _made_anew(model: nn.Module) -> None:
    model.delete_adapter("b")
    model.add_adapter("b", LoraConfig(r=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def _drawn_again(model: nn.Module) -> None:
    for layer in model.base_model.adapter_layers():
        layer.reset_lora_parameters("b")


CHANGED = {
    "written": _written, "replaced": _replaced, "a new module": _new_module, "hooked": _hooked, "stepped": _stepped,
    "scaled": lambda model: [layer.set_scale("b", 3.0) for layer in model.base_model.adapter_layers()],
    "made anew": _made_anew, "drawn again": _drawn_again, "cast": lambda model: model.double(),
    "switched": lambda model: model.set_adapter("c"), "a subset": lambda model: None,
}  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED)
def test_a_mixed_batch_sees_what_has_changed_since_the_last_one(changed):
    """What is kept of the adapters for the batches to come is theirs as they are."""
    config = dict(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), LoraConfig(r=2, **config), "a")
    for name, rank in (("b", 4), ("c", 2)):
        model.add_adapter(name, LoraConfig(r=rank, **config))
    model.eval()
    ids, names = tokens(6), ["a", "b", "__base__", "c", "b", "b"]
    with torch.no_grad():
        before = model(ids, adapter_names=names).logits
        CHANGED[changed](model)
        names = ["b", "c", "b", "b", "__base__", "b"] if changed == "a subset" else names
        for order in (names, names[::-1]):
            together = model(ids, adapter_names=order).logits
            alone = [model(ids[i : i + 1], adapter_names=[name]).logits for i, name in enumerate(order)]
            torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
        assert changed == "switched" or not torch.allclose(model(ids, adapter_names=names).logits, before.to(together))
        torch.testing.assert_close(copy.deepcopy(model)(ids, adapter_names=order).logits, together)
