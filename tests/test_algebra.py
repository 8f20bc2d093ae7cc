"""What the change of a weight is as a matrix, whatever the values that were trained; and methods that learn a task."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft
from peft.core.merge import apply
from tiny_models import Counting, assert_base_untouched, base_state, llama

torch.set_num_threads(1)
over = pytest.mark.parametrize
#: sizes of a layer [in, out] that the blocks of all methods here divide
SIZES = st.tuples(st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 24]))
SEEDS = st.integers(0, 2**16)
SPREADS = st.sampled_from([1e-3, 0.1, 1.0, 5.0])
few = settings(max_examples=15, deadline=None)


def layer_of(model: peft.PeftModel):
    return model.base_model.model[0]


def adapted(config: type, sizes: tuple[int, int], seed: int, spread: float, **fields) -> peft.PeftModel:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(*sizes)).double()
    model = peft.get_peft_model(model, config(target_modules=["0"], **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


ROTATIONS = [
    (peft.OFTConfig, dict(oft_block_size=4, use_cayley_neumann=False)),
    (peft.OFTConfig, dict(oft_block_size=4, use_cayley_neumann=False, block_share=True)),
    (peft.BOFTConfig, dict(boft_block_size=4)),
    (peft.BOFTConfig, dict(boft_block_size=4, boft_n_butterfly_factor=2, boft_all_factors=True)),
    (peft.HRAConfig, dict(r=4)),
    (peft.HRAConfig, dict(r=4, apply_GS=True)),
]


@over("config, fields", ROTATIONS)
@few
@given(width=st.sampled_from([8, 16, 24]), seed=SEEDS, spread=SPREADS)
def test_rotations_are_orthogonal_and_keep_the_angles_between_neurons(config, fields, width, seed, spread):
    layer = layer_of(adapted(config, (width, width), seed, spread, **fields))
    if config is peft.BOFTConfig:
        layer.boft_s["default"].data.fill_(1.0)  # its scale of the outputs is beside the rotation
    eye, weight = torch.eye(width, dtype=torch.float64), layer.weight.detach()
    rotation, changed = (apply(layer, layer.changes(["default"]), matrix) for matrix in (eye, weight))
    torch.testing.assert_close(rotation @ rotation.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(changed @ changed.T, weight @ weight.T, rtol=0, atol=1e-5)


@over(
    "config, fields, bound",
    [
        (peft.LoraConfig, dict(r=2), 2),
        (peft.AdaLoraConfig, dict(init_r=2, total_step=10), 2),
        (peft.VeraConfig, dict(r=3), 3),
        (peft.VBLoRAConfig, dict(r=2, num_vectors=6, vector_length=4), 2),
        (peft.LoHaConfig, dict(r=2), 4),
        (peft.MissConfig, dict(r=2), 2),
        (peft.HRAConfig, dict(r=2), 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@few
@given(sizes=SIZES, seed=SEEDS)
def test_the_change_has_no_more_than_its_rank(config, fields, bound, sizes, seed):
    layer = layer_of(adapted(config, sizes, seed, 0.3, **fields))
    change = layer.get_delta_weight("default").detach()
    values = torch.linalg.svdvals(change)
    assert values[0] > 0 and (values[bound:] < 1e-6 * values[0]).all()


@few
@given(sizes=SIZES, seed=SEEDS, r=st.integers(1, 3))
def test_shira_changes_as_many_entries_as_it_says(sizes, seed, r):
    layer = layer_of(adapted(peft.ShiraConfig, sizes, seed, 1.0, r=r))
    assert (layer.get_delta_weight("default") != 0).sum() == r * sum(sizes)


@over(
    "config, fields",
    [
        *ROTATIONS,
        (peft.LoHaConfig, dict(r=2)),
        (peft.LoKrConfig, dict(r=2)),
        (peft.VeraConfig, dict(r=3)),
        (peft.RandLoraConfig, dict(r=2)),
        (peft.FourierFTConfig, dict(n_frequency=20)),
        (peft.ShiraConfig, dict(r=1)),
    ],
)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_saving_what_was_loaded_gives_the_same_again(config, fields, seed, tmp_path_factory):
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    adapted(config, (8, 16), seed, 0.3, **fields).save_pretrained(first)
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(8, 16)).double()
    peft.PeftModel.from_pretrained(base, first).save_pretrained(second)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@over(
    "config, fields, rate",
    [
        (peft.LoHaConfig, dict(r=4, alpha=16), 2e-2),
        (peft.OFTConfig, dict(oft_block_size=8), 1e-2),
        (peft.RandLoraConfig, dict(r=4), 2e-2),
        (peft.MissConfig, dict(r=8), 1e-2),
    ],
)
def test_weight_methods_learn_to_count(config, fields, rate):
    base, rows = llama(), Counting(16).rows
    before, start = base_state(base), base(input_ids=rows, labels=rows).loss.item()
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    model = peft.get_peft_model(base, config(task_type="CAUSAL_LM", target_modules=targets, **fields)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(40):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # The frozen model guesses at best among 40 tokens.
    assert start > 3.0 and loss.item() < 0.5 * start
    assert_base_untouched(model, before)
