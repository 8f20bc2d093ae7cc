"""FourierFT, VB-LoRA, RandLoRA and AdaLoRA: what is special about each."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft
from peft.core import costs
from peft.core.merge import difference

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


# ---- FourierFT and RandLoRA


#: what decides whether a layer runs with a changed weight
WAYS = {"FOURIERFT": "add_as_weight", "RANDLORA": "low_rank_as_weight"}


def small(method: str) -> peft.PeftConfig:
    if method == "FOURIERFT":
        return peft.FourierFTConfig(n_frequency=30, scaling=20.0, **TARGETS)
    return peft.RandLoraConfig(r=3, randlora_alpha=3, init_weights=False, **TARGETS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", WAYS)
def test_structured_products_and_the_matrix_compute_the_same(method, dtype, monkeypatch):
    model = peft.get_peft_model(build().to(dtype), small(method))
    x = torch.randn(2, 3, 8, dtype=dtype)
    ways = []
    for by_matrix in (False, True):
        monkeypatch.setattr(costs, WAYS[method], lambda *args, by_matrix=by_matrix: by_matrix)
        ways.append(outcomes(model, x))
    for name, value in ways[0].items():
        error = (value - ways[1][name]).float().norm() / value.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.05), name


@pytest.mark.parametrize("method", WAYS)
def test_few_vectors_take_structured_products_and_many_the_matrix(method):
    config = {"FOURIERFT": peft.FourierFTConfig, "RANDLORA": peft.RandLoraConfig}[method](target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(256, 256)), config).base_model.model[0]
    (change,), prefers = layer.changes(["default"]), getattr(costs, WAYS[method])
    asked = change.folded() if method == "RANDLORA" else (change,)
    with torch.no_grad():
        assert not prefers(*asked, 1, 256, 256) and prefers(*asked, 1024, 256, 256)


@pytest.mark.parametrize("method", WAYS)
def test_a_change_small_beside_the_weight_shows_in_half_precision(method, monkeypatch):
    """It would be rounded away in a changed weight."""
    fields = {"n_frequency": 30} if method == "FOURIERFT" else {"r": 4}
    config = small(method).__class__(target_modules=["0"], **fields, init_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16(), config)
    layer = model.base_model.model[0]
    if method == "FOURIERFT":
        layer.fourierft_scaling["default"] = 1e-1
    else:
        layer.scaling = {"default": 1e-4}
    monkeypatch.setattr(costs, WAYS[method], lambda *args: True)
    layer.base_layer.weight.data.fill_(1.0)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, -1.0])  # so that the base gives zero
    delta = difference(layer, "default").float()
    assert 0 < delta.abs().max() < 1e-3
    expected = x.float() @ delta.T
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.02 * delta.abs().max().item())


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


# ---- RandLoRA


def test_randlora_bases_are_where_the_model_is_and_come_back_from_the_seed(tmp_path):
    config = peft.RandLoraConfig(r=3, save_projection=False, init_weights=False, projection_prng_key=4, **TARGETS)
    model, x = peft.get_peft_model(build(), config), torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in saved if key.endswith(("randlora_A", "randlora_B"))]
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))


def test_randlora_adapters_of_one_model_agree_on_their_bases():
    model = peft.get_peft_model(build(), peft.RandLoraConfig(r=3, **TARGETS))
    for changes in ({"projection_prng_key": 1}, {"save_projection": False}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            model.add_adapter("other", peft.RandLoraConfig(r=3, **changes, **TARGETS))
    model.add_adapter("other", peft.RandLoraConfig(r=2, **TARGETS))
    assert list(model.base_model.randlora_A) == ["default", "other"]


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


# ---- AdaLoRA


def adalora(**changes) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 3, **TARGETS, **changes}
    )


def train(model, steps):
    """Trains on a linear map; returns which ranks each step left."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    ranks = []
    for step in steps:
        x = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        (model(x) - 3 * x.flip(1)).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        ranks.append({name: (p != 0).flatten().tolist() for name, p in model.named_parameters() if "lora_E" in name})
    return ranks


def kept(ranks) -> int:
    return sum(sum(mask) for mask in ranks.values())


def test_adalora_drops_ranks_to_its_target_and_files_hold_those_that_are_left(tmp_path):
    model = peft.get_peft_model(build(), adalora(deltaT=2))
    ranks = train(model, range(10))
    assert kept(ranks[1]) == 8 and kept(ranks[7]) == kept(ranks[9]) == 4
    assert ranks[7] == ranks[8] == ranks[9]
    pattern = model.peft_config["default"].rank_pattern
    assert {f"base_model.model.{name}": mask for name, mask in pattern.items()} == ranks[9]
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, mask in peft.AdaLoraConfig.from_pretrained(tmp_path).rank_pattern.items():
        assert mask == ranks[9][f"base_model.model.{name}.default"]
        assert saved[f"base_model.model.{name}"].shape == (sum(mask), 1)
    x = torch.randn(5, 8)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)


def test_adalora_saved_while_ranks_are_allocated_can_be_trained_on(tmp_path):
    model = peft.get_peft_model(build(), adalora())
    assert kept(train(model, range(5))[-1]) < 8
    model.save_pretrained(tmp_path)
    assert peft.AdaLoraConfig.from_pretrained(tmp_path).rank_pattern is None
    resumed = peft.get_peft_model(build(), adalora())
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    x = torch.randn(5, 8)
    torch.testing.assert_close(resumed(x), model(x))
    assert kept(train(resumed, range(5, 10))[-1]) == 4


def test_adalora_inside_of_another_method_leaves_dropped_ranks_out_of_files_and_loads_them():
    model = peft.get_peft_model(build(), adalora(), "one", mixed=True)
    model.add_adapter("two", peft.HRAConfig(r=2, **TARGETS))
    model.set_adapter(["one", "two"])
    assert kept(train(model, range(10))[-1]) == 4
    tensors = peft.get_peft_model_state_dict(model, adapter_name="one")
    assert sum(len(tensor) for name, tensor in tensors.items() if name.endswith("lora_E")) == 4
    assert all(name.count("base_layer") == 0 for name in model.peft_config["one"].rank_pattern)
    again = peft.get_peft_model(build(), adalora(), "one", mixed=True)
    again.add_adapter("two", peft.HRAConfig(r=2, **TARGETS))
    assert not peft.set_peft_model_state_dict(again, tensors, "one").unexpected_keys
    model.set_adapter("one")
    x = torch.randn(5, 8)
    torch.testing.assert_close(again(x), model(x))


def test_adalora_adds_its_penalty_to_the_loss_of_the_model():
    class Output:
        pass

    class WithLoss(TwoLayers):
        def forward(self, x):
            output = Output()
            output.loss = super().forward(x).square().mean()
            return output

    torch.manual_seed(1)
    model, x = peft.get_peft_model(WithLoss(), adalora(orth_reg_weight=0.3)), torch.randn(3, 8)
    with model.disable_adapter():
        plain = model(x).loss
    loss = model(x).loss
    gaps = [
        torch.linalg.matrix_norm(f @ f.T - torch.eye(4))
        for layer in (model.base_model.model.first, model.base_model.model.second)
        for f in (layer.lora_A["default"], layer.lora_B["default"].T)
    ]
    torch.testing.assert_close(loss, plain + 0.3 * torch.stack(gaps).mean())
    loss.backward()
    assert model.base_model.model.first.lora_A["default"].grad.abs().sum() > 0


def test_adalora_without_gradients_or_without_anything_to_train_says_so():
    model = peft.get_peft_model(build(), adalora())
    with pytest.raises(ValueError, match="backward"):
        model.base_model.update_and_allocate(0)
    frozen = peft.get_peft_model(build(), adalora(inference_mode=True))
    with pytest.raises(ValueError, match="trainable"):
        frozen.base_model.update_and_allocate(0)
    assert frozen(torch.randn(2, 8)).shape == (2, 8)


def test_adalora_warns_of_what_has_no_effect():
    with pytest.warns(peft.errors.PeftWarning, match="r, use_rslora .*init_r"):
        adalora(r=4, use_rslora=True)


def test_adalora_dropout_on_a_convolution_and_embedding_that_scales():
    conv = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), adalora(target_modules=["0"], lora_dropout=0.5)
    )
    for parameter in conv.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 3, 5, 5)
    assert not torch.allclose(conv.train()(x), conv(x))
    torch.testing.assert_close(conv.eval()(x), conv.merge_and_unload()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.get_peft_model(nn.Sequential(nn.Embedding(5, 4)), adalora(target_modules=["0"], lora_dropout=0.5))


def test_the_ecosystem_finds_adalora_where_it_was():
    from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel, RankAllocator
    from peft.tuners.adalora.layer import RankAllocator as by_old_path

    model = peft.get_peft_model(build(), adalora())
    assert isinstance(model.base_model, AdaLoraModel)
    assert isinstance(model.base_model.rankallocator, RankAllocator) and by_old_path is RankAllocator
    assert isinstance(model.base_model.model.first, AdaLoraLayer)
