"""Every method on every kind of module: the promises that the mechanism makes for all of them."""

from __future__ import annotations

import copy
import pickle
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft
from peft.core.base_op import base_op
from peft.core.layer import AdapterLayer
from peft.registry import METHODS, Row
from quantised_layers import QUANTISED, held_bytes

torch.set_num_threads(1)

#: settings that a method needs to fit the small modules here, beyond its targets
SETTINGS: dict[str, dict] = {
    "LORA": {"r": 4, "lora_alpha": 6},
    "DEFT": {"r": 4},
    "GLORA": {"r": 2},
    "HIRA": {"r": 3},
    "HRA": {"r": 4},
    "PEANUT": {"r": 4, "depth": 1, "act_fn": "gelu"},
    "PSOFT": {"r": 3, "psoft_alpha": 6},
    "IA3": {"feedforward_modules": []},
    "VERA": {"r": 6},
    "LOHA": {"r": 1},
    "SHIRA": {"r": 1},
    "MISS": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [7, 9]},
    "OFT": {"oft_block_size": 2},
    "BOFT": {"boft_block_size": 2},
    "ADALORA": {"init_r": 4, "total_step": 10},
    "FOURIERFT": {"n_frequency": 20, "init_weights": True},
    "RANDLORA": {"r": 3, "randlora_alpha": 1},
    "GRALORA": {"r": 4, "hybrid_r": 2, "alpha": 6},
    "C3A": {"block_size": 2, "init_weights": True},
    "DELORA": {"r": 4, "delora_lambda": 3},
    "PVERA": {"r": 6},
    "ROAD": {"group_size": 4},
    "VBLORA": {"num_vectors": 6, "vector_length": 2, "init_vector_bank_bound": 1e-4},
    "TINYLORA": {"r": 2, "u": 6},
    "UNILORA": {"r": 2, "theta_d_length": 20, "init_theta_d_bound": 1e-3},
    "LILY": {"r": 4},
    "FROD": {"sparse_rate": 0.1, "progressbar": False},
    "OSF": {"effective_rank": 2},
    "WAVEFT": {"n_frequency": 20, "scaling": 2.0},
    "SUPERTUNING": {"sparsity": 0.8},
    "ADAMSS": {"r": 4, "num_subspaces": 2, "subspace_rank": 2, "save_clusters": True},
    # variants, by the method's name and theirs
    "SUPERTUNING Supra": {"sparsity": 0.8, "r": 2},
    "LORA DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "LORA BD-LoRA": {"r": 4, "use_bdlora": {"nblocks": 2, "target_modules_bd_b": ["target"]}},
    "LORA VeLoRA": {"r": 4, "velora_config": {"num_groups": 3, "init_type": "random"}},
    "LORA MonteCLoRA": {"r": 4, "monteclora_config": {"sample_scaler": 0.1}},
}
#: settings that a method's further adapters need
FURTHER: dict[str, dict] = {"ADALORA": {"inference_mode": True}}
#: (method, kind) whose change has no place in the base weight
UNMERGEABLE = (("LORA", "Conv2d groups"), ("LORA DoRA", "Conv2d groups"), ("BEFT", "Linear no bias"))
#: methods whose change is none of a weight, so that they cannot be merged at all
BESIDE = {"LILY"}
#: methods of which two adapters cannot exchange the same values
EXCLUSIVE = {"TRAINABLE_TOKENS"}
BATCH = 4


class Experts(nn.Module):
    """A mixture of experts with stacked weights [experts, out, in]."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("...i,eoi->...eo", x, self.up))
        return torch.einsum("...ei,eoi->...o", hidden, self.down)


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scale.T


KINDS = {
    "Linear": lambda: nn.Linear(8, 12),
    "Linear no bias": lambda: nn.Linear(8, 12, bias=False),
    "Conv1D": lambda: Conv1D(12, 8),
    "Conv1d": lambda: nn.Conv1d(4, 8, 3, padding=1),
    "Conv2d": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "Conv2d groups": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2),
    "Conv3d": lambda: nn.Conv3d(4, 8, 2),
    "Embedding": lambda: nn.Embedding(16, 8),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "MultiheadAttention sequence first": lambda: nn.MultiheadAttention(8, 2),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "Parameter": Matrix,
    "Parameter stacked": Experts,
}
PARAMETERS = {"Parameter": ["target.scale"], "Parameter stacked": ["target.up", "target.down"]}
#: how a linear layer may be held (see `quantised_layers`), and how far the nearest value that can be held may be,
#: relative to the largest weight
STORAGES = {"bnb 8bit": 0.005, "bnb 4bit": 0.17, "torchao int8": 0.005, "hqq": 0.1}
NOT_DENSE = ("Conv2d groups", "MultiheadAttention", "MultiheadAttention sequence first", *PARAMETERS)
NOT_LINEAR = (*NOT_DENSE, "Conv1d", "Conv2d", "Conv3d", "Embedding")
#: (variant, kind) that it does not go on, though the method does
REFUSED = {
    *(("LORA DoRA", kind) for kind in NOT_DENSE if kind != "Conv2d groups"),
    *((variant, kind) for variant in ("LORA BD-LoRA", "LORA VeLoRA", "LORA MonteCLoRA") for kind in NOT_LINEAR),
}


class Model(nn.Module):
    """One target module between fixed ones."""

    def __init__(self, kind: str, target: nn.Module | None = None):
        super().__init__()
        self.kind = kind
        self.target = target or KINDS[kind]()
        self.width = getattr(target, "in_features", 8)
        self.other = nn.Linear(self.width, self.width)

    def inputs(self, generator: torch.Generator) -> Tensor:
        if self.kind == "Embedding":
            return torch.randint(0, 16, (BATCH, 5), generator=generator)
        if "Conv" in self.kind and self.kind != "Conv1D":
            return torch.randn(BATCH, 4, *[6] * int(self.kind[4]), generator=generator)
        if "sequence first" in self.kind:
            return torch.randn(5, BATCH, 8, generator=generator)
        return torch.randn(BATCH, 5, self.width, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "Embedding":
            return self.other(self.target(x))
        if "Conv" in self.kind and self.kind != "Conv1D":
            return self.target(x)
        x = self.other(x)
        return self.target(x, x, x)[0] if "Attention" in self.kind else self.target(x)

    @property
    def batch_dim(self) -> int:
        return 1 if "sequence first" in self.kind else 0


def build(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(3)
    return Model(kind).to(dtype).eval()


def build_wide() -> Model:
    """For packages that hold weights in blocks of 64."""
    torch.manual_seed(3)
    return Model("Linear", nn.Linear(64, 96)).eval()


def build_quantised(storage: str) -> Model:
    model = build_wide()
    model.target = QUANTISED[storage](model.target)
    return model


def row_of(method: str) -> Row:
    """The row of the table for a method, or for a variant of it."""
    return METHODS[method.split()[0]]


def config_for(method: str, kind: str, **changes):
    where = (
        {"target_modules": [], "target_parameters": PARAMETERS[kind]}
        if kind in PARAMETERS
        else {"target_modules": ["target"]}
    )
    return row_of(method).config_class(**{**SETTINGS.get(method, {}), **where, **changes})


def randomise(model: nn.Module, name: str, seed: int = 5) -> None:
    """Gives an adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdapterLayer) and module.has(name):
                for parameter in module.trainable_parameters(name):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(method: str, kind: str, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("default",)):
    base = build_quantised(kind) if kind in STORAGES else build(kind, dtype)
    model = peft.get_peft_model(base, config_for(method, kind), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config_for(method, kind, **FURTHER.get(method, {})))
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    return model.eval()


def inputs_of(model, dtype: torch.dtype = torch.float32) -> Tensor:
    x = model.get_base_model().inputs(torch.Generator().manual_seed(7))
    return x.to(dtype) if x.is_floating_point() else x


def _supports(method: str, kind: str) -> bool:
    if (method, kind) in REFUSED:
        return False
    module, layer_class = build(kind).target, row_of(method).model_class.layer_class
    if kind in PARAMETERS:
        return "Parameter" in layer_class.kinds
    return base_op(module).kind in layer_class.kinds


#: no changes of a weight: SHADOW needs decoder blocks, POLY each sample's task, ADAPTION_PROMPT attention, XLORA saved
#: adapters
ELSEWHERE = ("SHADOW", "POLY", "ADAPTION_PROMPT", "XLORA")
LAYER_METHODS = [
    name
    for name, row in METHODS.items()
    if not row.prompt and name not in ELSEWHERE and hasattr(row.model_class, "layer_class")
]
LAYER_METHODS += [name for name in SETTINGS if " " in name]
CASES = [(method, kind) for method in LAYER_METHODS for kind in KINDS]
SUPPORTED = [case for case in CASES if _supports(*case)]
MERGEABLE = [case for case in SUPPORTED if case not in UNMERGEABLE and case[0] not in BESIDE]
over = pytest.mark.parametrize


@over("method, kind", [case for case in CASES if case not in SUPPORTED])
def test_unsupported_module_is_refused(method, kind):
    model = build(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match="not supported"):
        peft.get_peft_model(model, config_for(method, kind))
    assert_same_state(model, before)


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft_config") or not model.peft_config


@over("method, kind", SUPPORTED)
def test_a_fresh_adapter_changes_nothing(method, kind):
    base = build(kind)
    x = base.inputs(torch.Generator().manual_seed(7))
    model = peft.get_peft_model(build(kind), config_for(method, kind)).eval()
    torch.testing.assert_close(model(x), base(x), rtol=1e-4, atol=1e-5)


@over("method, kind", SUPPORTED)
def test_disabled_is_the_base_model_exactly(method, kind):
    model, base = adapted(method, kind), build(kind)
    x = inputs_of(model)
    changed, expected = model(x), base(x)
    assert not torch.allclose(changed, expected, atol=1e-4), "the adapter has no effect, so this would show nothing"
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), changed)
    assert torch.equal(model.unload()(x), expected)


@over("method, kind", MERGEABLE)
def test_merged_computes_the_same(method, kind):
    model = adapted(method, kind)
    x = inputs_of(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), build(kind)(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(type(module).__module__.startswith("peft") for module in merged.modules())
    assert list(merged.state_dict()) == list(build(kind).state_dict())


@over("dtype", [torch.bfloat16, torch.float16, torch.float32])
@over("method, kind", MERGEABLE)
def test_unmerge_gives_back_every_bit(method, kind, dtype):
    before = build(kind, dtype).state_dict()
    model = adapted(method, kind, dtype)
    model.merge_adapter()
    base = model.get_base_model()
    assert any(not torch.equal(base_value(base, name), value) for name, value in before.items())
    assert model.merge_memory() > 0
    model.unmerge_adapter()
    assert all(torch.equal(base_value(base, name), value) for name, value in before.items())
    assert model.merge_memory() == 0


def base_value(model: nn.Module, name: str) -> Tensor:
    """A tensor of the base model by the name it has without adapters."""
    module: nn.Module = model
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module.get_base_layer() if isinstance(module, AdapterLayer) else module, part)
    return getattr(module.get_base_layer() if isinstance(module, AdapterLayer) else module, leaf)


@over("method, kind", [case for case in SUPPORTED if case not in MERGEABLE])
def test_what_cannot_be_merged_says_so(method, kind):
    model = adapted(method, kind)
    x = inputs_of(model)
    expected = model(x)
    with pytest.raises((NotImplementedError, ValueError), match="merge"):
        model.merge_and_unload()
    assert torch.equal(model(x), expected)


@over("method, kind", SUPPORTED)
def test_save_and_load(method, kind, tmp_path):
    model = adapted(method, kind)
    x = inputs_of(model)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(build(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(loaded(x), model(x))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    mine, theirs = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(loaded)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@over("method, kind", SUPPORTED)
def test_mixed_batch_is_each_alone(method, kind):
    model = adapted(method, kind, names=("a", "b"))
    x = inputs_of(model)
    rows = ["a", "__base__", "b", "a"]
    assert_each_alone(model, x, rows, model.get_base_model().batch_dim)


def assert_each_alone(model, x: Tensor, rows: list[str], dim: int = 0) -> None:
    """The samples of each adapter in a mixed batch come out as in a batch of their own."""
    mixed = model(x, adapter_names=rows)
    for name in dict.fromkeys(rows):
        own = torch.tensor([row for row, other in enumerate(rows) if other == name])
        with model.disable_adapter() if name == "__base__" else nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            alone = model(x.index_select(dim, own))
        torch.testing.assert_close(mixed.index_select(dim, own), alone, rtol=1e-4, atol=1e-5)


@over("method, kind", SUPPORTED)
def test_gradients_go_to_the_active_adapter_alone(method, kind):
    model = adapted(method, kind, names=("a", "b"))
    model.set_adapter("b")
    model.train()
    model(inputs_of(model)).square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert with_gradient == trainable
    assert trainable
    assert all(".b" in name for name in trainable)


@over("method, kind", [case for case in MERGEABLE if case[0] not in EXCLUSIVE])
def test_several_active_adapters_act_as_when_merged(method, kind):
    model = adapted(method, kind, names=("a", "b"))
    model.base_model.set_adapter(["a", "b"])
    x = inputs_of(model)
    together = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), together, rtol=1e-3, atol=1e-4)


@over("method, kind", SUPPORTED)
def test_deepcopy_and_pickle(method, kind):
    model = adapted(method, kind, names=("a", "b"))
    x = inputs_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        twin.set_adapter("b")
        assert not torch.allclose(twin(x), model(x), atol=1e-4)
        twin.delete_adapter("b")
        assert list(model.peft_config) == ["a", "b"]


@over("method, kind", SUPPORTED)
def test_deleting_leaves_the_others(method, kind):
    model = adapted(method, kind, names=("a", "b"))
    x = inputs_of(model)
    expected = model(x)
    model.delete_adapter("b")
    assert torch.equal(model(x), expected)
    assert not [name for name, _ in model.named_parameters() if name.endswith(".b") or ".b." in name]
    assert list(model.peft_config) == ["a"]


@over("method", LAYER_METHODS)
def test_a_scale_is_set_or_it_is_said_that_there_is_none(method):
    kind = next(kind for kind in KINDS if (method, kind) in SUPPORTED)
    model = adapted(method, kind)
    layer, x = next(model.base_model.adapter_layers()), inputs_of(model)
    before, initial = model(x), layer.initial_scaling("default") if hasattr(layer, "initial_scaling") else None
    for call, factor in ((lambda: layer.set_scale("default", 3), 3), (lambda: layer.scale_layer(2), 6)):
        with nullcontext() if initial is not None else pytest.warns(peft.PeftWarning, match="scale is not supported"):
            call()
        assert initial is None or layer.scaling["default"] == factor * initial
        assert torch.equal(model(x), before) == (initial is None)
    layer.unscale_layer(6 if initial is not None else None)
    torch.testing.assert_close(model(x), before)


@over("method, kind", SUPPORTED)
def test_a_failed_add_leaves_nothing(method, kind, monkeypatch):
    model = adapted(method, kind)
    x = inputs_of(model)
    expected = model(x)
    state = {name: (value.clone(), value.requires_grad) for name, value in model.state_dict(keep_vars=True).items()}
    layer_class = row_of(method).model_class.layer_class

    def fail(self, name, config, **settings):
        original(self, name, config, **settings)
        raise MemoryError("no memory left")

    for subclass in {layer_class, *layer_class.__subclasses__()}:
        if subclass is layer_class or "create" in vars(subclass):
            original = subclass.create
            monkeypatch.setattr(subclass, "create", fail)
    with pytest.raises(MemoryError):
        model.add_adapter("other", config_for(method, kind, **FURTHER.get(method, {})))
    plain = build(kind)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with pytest.raises(MemoryError):
        peft.get_peft_model(plain, config_for(method, kind))
    assert_same_state(plain, before)
    assert list(model.peft_config) == ["default"]
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(
        torch.equal(after[name], value) and after[name].requires_grad == grad for name, (value, grad) in state.items()
    )
    assert torch.equal(model(x), expected)


@over("method", LAYER_METHODS)
def test_half_precision_base_trains_the_adapter_in_float32(method):
    model = adapted(method, "Linear", torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    output = model(inputs_of(model, torch.bfloat16))
    assert output.dtype == torch.bfloat16
    kept = peft.get_peft_model(
        build("Linear", torch.bfloat16), config_for(method, "Linear"), autocast_adapter_dtype=False
    )
    assert all(parameter.dtype == torch.bfloat16 for parameter in kept.parameters() if parameter.requires_grad)


@over("dtype", [torch.bfloat16, torch.float16])
@over("method", LAYER_METHODS)
def test_all_in_half_precision_runs_without_gradients_and_is_merged(method, dtype):
    for whole in (False, True):
        model = adapted(method, "Linear", dtype)
        model, x = model.to(dtype) if whole else model, inputs_of(model, dtype)
        with torch.no_grad():
            outputs = [model(some) for some in (x[:1, 0], x)]
        assert all(output.dtype == dtype and output.isfinite().all() for output in outputs)
        if (method, "Linear") in MERGEABLE:
            model.merge_adapter()
            torch.testing.assert_close(model(x), outputs[1], rtol=0.1, atol=0.1)


@over("method", [*LAYER_METHODS, "LORA DoRA"])
def test_a_model_made_in_inference_mode_runs(method):
    with torch.inference_mode():
        model = adapted(method, "Linear")
        x = inputs_of(model)
        model.train()(x)
        expected = model.eval().requires_grad_(False)(x)
        assert torch.equal(model(x), expected)
        with model.disable_adapter():
            assert not torch.equal(model(x), expected)
    with torch.no_grad():  # with gradients, sums may go another way
        assert torch.equal(adapted(method, "Linear")(x), expected)


@over("method", LAYER_METHODS)
def test_training_goes_on_after_inference_and_inside_autocast(method):
    """What is kept from a pass in inference mode is of use in the next; a backward pass may run inside autocast."""
    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith("peft.ops.") else ():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    model = adapted(method, "Linear")
    x = inputs_of(model)
    with torch.inference_mode():
        model.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().pow(2).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@over("method", [method for method in LAYER_METHODS if method not in BESIDE])
def test_two_methods_on_one_module(method):
    """In a mixed model, adapters of different methods act one on top of the other, merged or not."""
    model = peft.get_peft_model(build("Linear"), config_for(method, "Linear"), adapter_name="a", mixed=True)
    other = "HRA" if method != "HRA" else "LORA"
    model.add_adapter("b", config_for(other, "Linear"))
    model.set_adapter(["a", "b"])
    for seed, name in enumerate("ab"):
        randomise(model, name, seed)
    model.eval()
    x = model.base_model.model.inputs(torch.Generator().manual_seed(7))
    together = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), together, rtol=1e-3, atol=1e-4)


# ---- linear layers whose weights are quantised

WITH_LINEAR = [method for method in LAYER_METHODS if (method, "Linear") in SUPPORTED]
on_storages = over("method, storage", [(method, storage) for method in WITH_LINEAR for storage in STORAGES])
changing_storages = over(
    "method, storage", [(method, storage) for method in WITH_LINEAR if method not in BESIDE for storage in STORAGES]
)


def layer_of(model) -> AdapterLayer:
    layer = model.get_base_model().target
    assert isinstance(layer, AdapterLayer)
    return layer


@changing_storages
def test_quantised_forward_and_gradients(method, storage):
    """The adapter acts on what the layer holds; switched off it leaves the layer alone; it alone gets gradients."""
    model, base = adapted(method, storage), build_quantised(storage)
    x = inputs_of(model)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    layer = layer_of(model)
    wanted = torch.nn.functional.linear(base.other(x), *layer.effective())
    close = 0.03 if storage == "bnb 8bit" else 1e-4  # its inputs are rounded to 8 bits too
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=close * wanted.abs().max().item())
    model(x).square().sum().backward()
    with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert with_gradient and all(parameter.requires_grad for parameter in with_gradient)


@changing_storages
def test_quantised_weights_are_merged_to_the_nearest_and_unmerged_exactly(method, storage):
    model = adapted(method, storage)
    layer = layer_of(model)
    before, bias = held_bytes(layer.get_base_layer()), layer.get_base_bias().clone()
    wanted = layer.effective()[0].detach()
    model.merge_adapter()
    merged = layer.get_base_weight()
    assert (merged - wanted).abs().max() <= STORAGES[storage] * wanted.abs().max()
    assert type(layer.get_base_layer()) is type(QUANTISED[storage](nn.Linear(8, 12)))
    assert not all(map(torch.equal, held_bytes(layer.get_base_layer()), before)) or not torch.equal(
        layer.get_base_bias(), bias
    )
    assert model.merge_memory() > 0
    merged_forward = model(inputs_of(model))
    model.unmerge_adapter()
    assert all(map(torch.equal, held_bytes(layer.get_base_layer()), before))
    assert torch.equal(layer.get_base_bias(), bias)
    torch.testing.assert_close(model.merge_and_unload()(inputs_of(model)), merged_forward)


@on_storages
def test_quantised_save_and_load(method, storage, tmp_path):
    """An adapter has the same files whatever it was trained on, and works on a plain base too."""
    model = adapted(method, storage)
    x = inputs_of(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build_quantised(storage), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    plain = peft.PeftModel.from_pretrained(build_wide(), tmp_path)
    mine, theirs = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(plain)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@on_storages
def test_quantised_mixed_batch_is_each_alone(method, storage):
    model = adapted(method, storage, names=("a", "b"))
    x = inputs_of(model)
    assert_each_alone(model, x, ["a", "__base__", "b", "a"])


@over("method", [method for method in LAYER_METHODS if "r" in row_of(method).config_class.__dataclass_fields__])
def test_layers_say_the_rank_of_each_adapter(method):
    model = adapted(method, "Linear")
    found = {"OFT": 4, "ADALORA": 4}  # as many blocks as there are, and what the schedule begins with
    assert model.base_model.model.target.r == {"default": found.get(method, model.active_peft_config.r)}
