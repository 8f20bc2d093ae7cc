"""Adapters combined: the maths on tensors, weighted adapters of LoRA and (IA)^3."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from peft import IA3Config, LoraConfig, PeftModel, PeftWarning, get_peft_model
from peft.core.slots import Slot
from peft.lora_tools.intruders import reduce_intruder_dimension
from peft.ops import merging as ops
from peft.ops.principal import truncated_svd
from peft.tuners.lora.combine import COMBINATIONS

PRUNING = [name for name in COMBINATIONS if name not in ("linear", "cat", "svd")]


# ---- tensors


def test_prune_keeps_the_largest():
    assert ops.prune(torch.tensor([[1.0, -4.0], [3.0, -2.0]]), 0.5).tolist() == [[0, -4], [3, 0]]


def test_random_pruning_keeps_the_expectation():
    torch.manual_seed(0)
    pruned = ops.prune(torch.ones(10_000), 0.25, "random", rescale=True)
    assert set(pruned.tolist()) == {0.0, 4.0}
    assert pruned.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("density", [-0.1, 1.1, None])
def test_density_is_a_share(density):
    with pytest.raises(ValueError, match="density"):
        ops.combine([torch.ones(2)], [1.0], "magnitude_prune", density)


def test_signs_are_elected_by_weight_or_by_number():
    tensors = torch.tensor([[1.0, 5.0, 0.0], [2.0, -1.0, 0.0], [-4.0, -1.0, 0.0]])
    assert ops.calculate_majority_sign_mask(tensors, "total").int().tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert ops.calculate_majority_sign_mask(tensors, "frequency").int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_ties_averages_those_that_agree():
    tensors = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, -1.0]), torch.tensor([-4.0, -1.0])]
    assert ops.ties(tensors, [1.0, 1.0, 1.0], density=1.0).tolist() == [-4, 5]
    assert ops.ties(tensors, [1.0, 1.0, 1.0], 1.0, "frequency").tolist() == [1.5, -1]


def test_negative_weights_take_away():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])]
    assert ops.task_arithmetic(tensors, [1.0, -1.0]).tolist() == [0, 4]


def test_truncated_svd_is_the_nearest_of_its_rank():
    torch.manual_seed(0)
    matrices = torch.randn(3, 6, 8, dtype=torch.float64)
    u, s, vh = truncated_svd(matrices, 2)
    assert u.shape == (3, 6, 2) and s.shape == (3, 2) and vh.shape == (3, 2, 8)
    error = torch.linalg.matrix_norm(matrices - u * s[:, None] @ vh) ** 2
    torch.testing.assert_close(error, (torch.linalg.svdvals(matrices)[:, 2:] ** 2).sum(1))


def test_a_product_is_decomposed_without_being_made():
    torch.manual_seed(0)
    b, a = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(3, 4, 7, dtype=torch.float64)
    u, s, vh = ops.svd_of_product(b, a)
    torch.testing.assert_close(u * s[:, None] @ vh, b @ a)
    torch.testing.assert_close(s, torch.linalg.svdvals(b @ a)[:, :4])
    for columns in (u, vh.mT):
        torch.testing.assert_close(columns.mT @ columns, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


def test_clamping_to_a_quantile():
    a, b = ops.clamp_to_quantile([torch.tensor([1.0, -9.0]), torch.tensor([[2.0, 3.0, 4.0]])], 0.75)
    bound = torch.quantile(torch.tensor([1.0, -9, 2, 3, 4]), 0.75).item()
    assert a.tolist() == [1, -bound] and b.tolist() == [[2, bound, bound]]


# ---- LoRA


class Everything(nn.Module):
    """One module of each kind that an adapter goes on."""

    def __init__(self) -> None:
        super().__init__()
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


TARGETS = ["embed", "attention", "linear", "conv", "grouped"]
TOKENS = torch.arange(12).view(2, 6)


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **settings})


def model_with(*configs, names="abc") -> PeftModel:
    """A model with an adapter for each configuration, called a, b, c; all with an effect."""
    torch.manual_seed(0)
    model = get_peft_model(Everything(), configs[0], adapter_name="a")
    for name, config in zip(names[1:], configs[1:], strict=False):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def changes(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What an adapter changes each weight by, where that has the weight's shape."""
    return {
        key: layer.get_delta_weight(name)
        for key, layer in model.base_model.parts()
        if hasattr(layer, "get_delta_weight") and layer.has(name) and not key.endswith("grouped")
    }


def output(model: PeftModel, name: str) -> Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        return model(TOKENS)


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_cat_and_svd_are_the_sum_of_the_changes(kind, weights):
    model = model_with(lora(), lora(r=2, lora_alpha=3, rank_pattern={"linear": 3}))
    model.add_weighted_adapter(["a", "b"], weights, "w", combination_type=kind, svd_rank=8 if kind == "svd" else None)
    a, b = changes(model, "a"), changes(model, "b")
    for key, change in changes(model, "w").items():
        torch.testing.assert_close(change, weights[0] * a[key] + weights[1] * b[key], atol=1e-5, rtol=1e-4)


def test_grouped_convolutions_are_summed_too():
    # Their change has no place in the base weight, so the sum is seen in what they put out.
    model = model_with(*(lora(target_modules=["grouped"], r=r) for r in (4, 2)))
    layer, x = model.base_model.model.grouped, torch.randn(1, 8, 5)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "cat", combination_type="cat")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "svd", combination_type="svd", svd_rank=8)

    def effect(name: str) -> Tensor:
        model.set_adapter(name)
        return layer(x) - layer.base_layer(x)

    expected = 0.7 * effect("a") - 0.4 * effect("b")
    torch.testing.assert_close(effect("cat"), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(effect("svd"), expected, atol=1e-5, rtol=1e-4)


def test_linear_sums_the_factors():
    model = model_with(lora(target_modules=["linear"]), lora(target_modules=["linear"], lora_alpha=1))
    model.add_weighted_adapter(["a", "b"], [2.0, -0.5], "w", combination_type="linear")
    layer = model.base_model.model.linear
    (a0, b0), (a1, b1), (a, b) = (layer.factors(name) for name in ("a", "b", "w"))
    root0, root1 = (2.0 * 6 / 4) ** 0.5, (0.5 * 1 / 4) ** 0.5
    torch.testing.assert_close(a, root0 * a0 - root1 * a1)
    torch.testing.assert_close(b, root0 * b0 + root1 * b1)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_every_combination_is_an_adapter_like_any_other(kind, tmp_path):
    model = model_with(lora(), lora(lora_alpha=2))
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "w", combination_type=kind, density=0.6)
    assert model.active_adapters == ["a"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".w." in name)
    before = output(model, "w")
    assert not torch.allclose(before, output(model, "a"))

    model.save_pretrained(tmp_path, selected_adapters=["w"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Everything(), tmp_path / "w").eval()
    torch.testing.assert_close(again(TOKENS), before)

    model.delete_adapter("w")
    assert list(model.peft_config) == ["a", "b"]
    assert not any(".w." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", PRUNING)
def test_keeping_everything_is_no_pruning(kind):
    """With one adapter and density 1 nothing is pruned, no sign is outvoted, and the outcome is the adapter."""
    model = model_with(lora(target_modules=["embed", "linear", "conv"]))
    model.add_weighted_adapter(["a"], [0.5], "w", combination_type=kind, density=1.0)
    a = changes(model, "a")
    for key, change in changes(model, "w").items():
        torch.testing.assert_close(change, 0.5 * a[key], atol=1e-5, rtol=1e-4)


def test_svd_finds_the_nearest_of_a_lower_rank():
    model = model_with(lora(target_modules=["linear"]), lora(target_modules=["linear"]))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "w", svd_rank=2)
    layer = model.base_model.model.linear
    whole = layer.get_delta_weight("a") + layer.get_delta_weight("b")
    u, s, vh = torch.linalg.svd(whole)
    torch.testing.assert_close(layer.get_delta_weight("w"), u[:, :2] * s[:2] @ vh[:2], atol=1e-5, rtol=1e-4)
    assert layer.r["w"] == model.peft_config["w"].r == 2 and layer.scaling["w"] == 1


def test_svd_has_the_largest_rank_of_the_adapters_unless_told():
    model = model_with(lora(rank_pattern={"linear": 7}, r=2), lora(r=4))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "w")
    ranks = {key: layer.r["w"] for key, layer in model.base_model.parts()}
    assert ranks.pop("grouped") == 6  # its two groups share the rank
    assert set(ranks.values()) == {7}
    a, b = changes(model, "a"), changes(model, "b")  # ranks 2 and 4: there is room for all of the sum
    for key, change in changes(model, "w").items():
        if key != "linear":
            torch.testing.assert_close(change, a[key] + b[key], atol=1e-5, rtol=1e-4)


def test_svd_has_no_larger_rank_than_the_weight():
    model = model_with(lora(target_modules=["linear", "head"], rank_pattern={"linear": 6, "head": 2}))
    model.add_weighted_adapter(["a"], [1.0], "w", density=1.0, combination_type="ties_svd")
    assert (model.base_model.model.linear.r["w"], model.base_model.model.head.r["w"]) == (6, 3)


def test_what_is_dropped_from_an_embedding_is_drawn_token_by_token():
    model = model_with(*[lora(target_modules=["embed"], r=2)] * 2)
    layer = model.base_model.model.embed
    torch.manual_seed(3)
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "w", "dare_linear_svd", svd_rank=8, density=0.5)
    torch.manual_seed(3)
    for size in (8 * 20, 8 * 8):  # the start values that huggingface/peft draws first
        torch.randn(size)
    a, b = (layer.get_delta_weight(name) for name in ("a", "b"))
    expected = ops.dare_linear([a, b], [1.0, 0.5], 0.5)
    torch.testing.assert_close(layer.get_delta_weight("w"), expected, atol=1e-5, rtol=1e-4)


def test_ranks_by_module_are_kept_by_module(tmp_path):
    """huggingface/peft writes one rank for all modules, so that the saved adapter cannot be loaded."""
    model = model_with(lora(rank_pattern={"linear": 2}), lora(rank_pattern={"linear": 2, "attention": 6}))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "w", combination_type="cat")
    model.save_pretrained(tmp_path, selected_adapters=["w"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Everything(), tmp_path / "w").eval()
    assert again.base_model.model.linear.r["default"] == 4
    assert again.base_model.model.attention.r["default"] == 10
    torch.testing.assert_close(again(TOKENS), output(model, "w"))


def test_rank_stabilised_adapters():
    """The new adapter's scale is one; huggingface/peft takes use_rslora over and scales it again."""
    model = model_with(*[lora(use_rslora=True, target_modules=["linear"])] * 2)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "w", combination_type="cat")
    layer = model.base_model.model.linear
    expected = (layer.get_delta_weight("a") + layer.get_delta_weight("b")) / 2
    torch.testing.assert_close(layer.get_delta_weight("w"), expected)


def test_biases_of_the_factors_are_combined():
    """huggingface/peft leaves them as they were drawn."""
    model = model_with(*[lora(lora_bias=True, target_modules=["linear", "conv"])] * 2)
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "w", combination_type="cat")
    layer = model.base_model.model.linear
    torch.testing.assert_close(
        layer.lora_B["w"].bias, 1.5 * (0.5 * layer.lora_B["a"].bias - layer.lora_B["b"].bias), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("first, second", [(["linear"], ["linear", "conv"]), (["linear", "conv"], ["linear"])])
def test_adapters_on_different_modules(first, second):
    model = model_with(lora(target_modules=first), lora(target_modules=second))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "w", combination_type="cat")
    assert model.peft_config["w"].target_modules == {"linear", "conv"}
    weight = 1.0 if "conv" in first else 0.5
    conv = model.base_model.model.conv
    torch.testing.assert_close(conv.get_delta_weight("w"), weight * conv.get_delta_weight("a" if weight == 1 else "b"))


def test_targets_are_exactly_those_of_the_adapters():
    """`up` of the outer module is adapted; the inner one has that name too, and must stay as it is."""
    base = nn.ModuleDict({"up": nn.Linear(4, 4), "inner": nn.ModuleDict({"up": nn.Linear(4, 4)})})
    model = get_peft_model(base, LoraConfig(target_modules="up"), adapter_name="a")
    model.add_adapter("b", LoraConfig(target_modules=["up"], exclude_modules=["inner.up"]))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "w", combination_type="cat")
    assert [key for key, layer in model.base_model.parts() if layer.has("w")] == ["up"]


def test_what_one_adapter_trains_in_full_is_taken_over():
    """huggingface/peft gives the new adapter a fresh copy of the base module."""
    model = model_with(lora(modules_to_save=["head"]), lora())
    head = model.base_model.model.head.modules_to_save["a"]
    nn.init.normal_(head.weight)
    model.add_weighted_adapter(["b", "a"], [0.5, 0.5], "w", combination_type="cat")
    assert torch.equal(model.base_model.model.head.modules_to_save["w"].weight, head.weight)


def test_trained_tokens_are_taken_over():
    model = model_with(
        lora(target_modules=["linear"], trainable_token_indices={"embed": [1, 3]}), lora(target_modules=["linear"])
    )
    delta = model.base_model.model.embed.token_adapter.trainable_tokens_delta
    nn.init.normal_(delta["a"])
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "w", combination_type="cat")
    assert torch.equal(delta["w"], delta["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*COMBINATIONS, "intruders"])
def test_half_precision_adapters_stay_so_and_are_rounded_once(kind, dtype):
    torch.manual_seed(0)
    config = lora(target_modules=["embed", "linear", "conv"])
    model = get_peft_model(Everything().to(dtype), config, adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", config, autocast_adapter_dtype=False)
    exact = copy.deepcopy(model).float()
    for each in (model, exact):
        torch.manual_seed(1)
        if kind == "intruders":
            reduce_intruder_dimension(each, "a", "w", logging_sink=None)
        else:
            each.add_weighted_adapter(["a", "b"], [0.7, 0.6], "w", combination_type=kind, density=0.5)
    made = dict(model.named_parameters())
    for name, parameter in exact.named_parameters():
        if re.search(r"\.w(\.|$)", name):
            torch.testing.assert_close(made[name], parameter.to(dtype), rtol=0, atol=0)  # dtypes too


@pytest.mark.parametrize("start", [True, False])
def test_what_is_dropped_is_drawn_after_the_start_values(start):
    # huggingface/peft makes the new adapter first, with the start of the first one.
    model = model_with(*[lora(target_modules=["linear"], init_lora_weights=start)] * 2)
    layer = model.base_model.model.linear
    for name in ("a", "b"):
        layer.lora_B[name].weight.data.normal_()
    torch.manual_seed(3)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "w", "dare_linear", density=0.5)
    torch.manual_seed(3)
    for size in (4 * 8, 4 * 12, 4 * 8) if start else (4 * 8, 4 * 12):
        torch.rand(size)
    root = (6 / 4) ** 0.5
    expected = ops.dare_linear([layer.factors(name)[0] for name in ("a", "b")], [root, root], 0.5)
    torch.testing.assert_close(layer.factors("w")[0], expected)


def state_of(model: PeftModel) -> tuple:
    return (
        {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()},
        list(model.peft_config),
        model.active_adapters,
    )


FAULTS = {
    "unknown adapter": (["a", "zzz"], [1.0, 1.0], {}, ValueError, "zzz"),
    "unknown type": (["a", "b"], [1.0, 1.0], {"combination_type": "zzz"}, ValueError, "combination_type"),
    "ranks": (["a", "b"], [1.0, 1.0], {"combination_type": "ties", "density": 0.5}, ValueError, "same r"),
    "no density": (["a", "a"], [1.0, 1.0], {"combination_type": "dare_linear"}, ValueError, "density"),
    "density": (["a", "a"], [1.0, 1.0], {"combination_type": "ties", "density": 2.0}, ValueError, "density"),
    "svd_rank 0": (["a", "b"], [1.0, 1.0], {"svd_rank": 0}, ValueError, "svd_rank"),
    "svd_rank too large": (["a", "b"], [1.0, 1.0], {"svd_rank": 50}, ValueError, "svd_rank"),
    "svd_clamp": (["a", "b"], [1.0, 1.0], {"svd_clamp": 2.0}, ValueError, "svd_clamp"),
    "nothing": ([], [], {}, ValueError, "At least one"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_raises_changes_nothing(fault):
    adapters, weights, settings, error, words = FAULTS[fault]
    model = model_with(lora(), lora(r=2))
    before = state_of(model)
    with pytest.raises(error, match=words):
        model.add_weighted_adapter(adapters, weights, "w", **settings)
    after = state_of(model)
    assert after[1:] == before[1:] and after[0].keys() == before[0].keys()
    assert all(
        torch.equal(value, after[0][name][0]) and grad == after[0][name][1] for name, (value, grad) in before[0].items()
    )


def with_magnitude(model: PeftModel) -> PeftModel:
    """Adapters with a tensor beside their factors, as variants of LoRA have them."""
    layer = model.base_model.model.linear
    layer.add_slot("lora_magnitude", Slot())
    layer.lora_magnitude.update({name: torch.ones(12) for name in layer.adapter_names()})
    return model


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_adapters_that_are_more_than_a_product_are_refused(kind):
    """huggingface/peft combines the factors and starts the rest anew."""
    model = with_magnitude(model_with(*[lora(target_modules=["linear"])] * 2))
    with pytest.raises(ValueError, match="lora_magnitude beside its factors"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "w", combination_type=kind)
    with pytest.raises(ValueError, match="lora_magnitude beside its factors"):
        reduce_intruder_dimension(model, "a", "w")
    assert list(model.peft_config) == ["a", "b"]


def test_a_taken_name_is_refused():
    model = model_with(lora(), lora())
    with pytest.raises(ValueError, match="'b' exists already"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "b", combination_type="cat")


def test_adapters_without_a_weight_are_left_out_and_said_to_be():
    model = model_with(*[lora(target_modules=["linear"])] * 2)
    with pytest.warns(PeftWarning, match="only the first 1"):
        model.add_weighted_adapter(["a", "b"], [1.0], "w", combination_type="cat")
    layer = model.base_model.model.linear
    torch.testing.assert_close(layer.get_delta_weight("w"), layer.get_delta_weight("a"))


# ---- (IA)^3


def ia3(**settings) -> IA3Config:
    return IA3Config(**{"target_modules": ["linear", "conv"], "feedforward_modules": ["conv"], **settings})


def test_ia3_vectors_are_summed(tmp_path):
    model = model_with(ia3(), ia3(target_modules=["linear", "conv", "attention"]))
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "w")
    inner = model.base_model.model
    for layer in (inner.linear, inner.conv):
        torch.testing.assert_close(layer.ia3_l["w"], 0.7 * layer.ia3_l["a"] + 0.3 * layer.ia3_l["b"])
    # Where an adapter is not, it leaves activations as they are.
    torch.testing.assert_close(inner.attention.ia3_l["w"], 0.7 + 0.3 * inner.attention.ia3_l["b"])
    model.save_pretrained(tmp_path, selected_adapters=["w"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Everything(), tmp_path / "w").eval()
    torch.testing.assert_close(again(TOKENS), output(model, "w"))


def test_ia3_faults_change_nothing():
    model = model_with(ia3(), ia3())
    before = state_of(model)
    with pytest.raises(ValueError, match="zzz"):
        model.add_weighted_adapter(["a", "zzz"], [1.0, 1.0], "w")
    assert state_of(model)[1:] == before[1:]


# ---- intruder dimensions


def test_intruders_are_shrunk():
    """One direction is planted that is like none of the weight's, beside one that the weight has."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8, bias=False))
    u, _, v = torch.linalg.svd(torch.randn(8, 8))
    base[0].weight.data = u * torch.tensor([4, 3, 2, 1, 4e-4, 3e-4, 2e-4, 1e-4]) @ v
    foreign = 9 * u[:, 4:].mean(1, keepdim=True) * 2 @ (v[4:].mean(0, keepdim=True) * 2)
    known = 0.5 * u[:, :1] @ v[:1]
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, lora_alpha=4))
    layer = model.base_model.model[0]
    left, s, right = torch.linalg.svd((foreign + known) / layer.scaling["default"])
    layer.lora_A["default"].weight.data = right[:2].contiguous()
    layer.lora_B["default"].weight.data = left[:, :2] * s[:2]
    lines: list[str] = []
    reduce_intruder_dimension(model, top_k=3, threshold_epsilon=0.6, mitigation_lambda=0.25, logging_sink=lines.append)
    close = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), 0.25 * foreign + known, **close)
    torch.testing.assert_close(layer.get_delta_weight("default"), foreign + known, **close)
    assert model.active_adapters == ["intruder_reduced"] and "0: 1 intruders" in lines[0]


def test_intruders_on_every_kind_of_layer(capsys):
    model = model_with(lora(lora_bias=True, target_modules=TARGETS[1:]), names="ab")
    reduce_intruder_dimension(model, "a", "b", mitigation_lambda=1.0)
    torch.testing.assert_close(output(model, "b"), output(model, "a"), atol=1e-4, rtol=1e-3)
    reduce_intruder_dimension(model, "a", "c", mitigation_lambda=0.0, threshold_epsilon=0.9, logging_sink=None)
    assert not torch.allclose(output(model, "c"), output(model, "a"))
    assert capsys.readouterr().out.count("intruders among") == 5


def test_intruders_are_for_unmerged_loras():
    with pytest.raises(ValueError, match="LoRA models only"):
        reduce_intruder_dimension(model_with(ia3()), "a")
    model = model_with(lora(target_modules=["linear"]))
    with pytest.raises(ValueError, match="zzz"):
        reduce_intruder_dimension(model, "zzz")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        reduce_intruder_dimension(model, "a")
