"""What is special to AdaMSS: clusters of rows, and subspaces that are dropped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from peft.ops.principal import leading_parts
from peft.ops.rank_budget import budget_at, track_sensitivity
from peft.ops.subspaces import cluster_basis, cluster_rows, spread_rows

pytest.importorskip("sklearn")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10, bias=False))


def adapted(**settings) -> nn.Module:
    config = peft.AdamssConfig(target_modules=["0", "2"], **{"r": 6, "num_subspaces": 3, **settings})
    return peft.get_peft_model(net(), config)


def layers(model: nn.Module) -> list:
    return [model.base_model.model[0], model.base_model.model[2]]


def test_rows_of_a_cluster_get_its_product():
    model = adapted(subspace_rank=2, init_weights=None)
    for layer in layers(model):
        rights, rows, start = layer.adamss_newB["default"], layer.adamss_rows["default"], 0
        assert sorted(rows.tolist()) == list(range(layer.out_features))
        expected = torch.zeros(layer.out_features, rights.shape[1])
        for a, b in layer.pairs("default"):
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-5, rtol=0)
            expected[rows[start : start + len(b)]] = b @ a @ rights
            start += len(b)
        torch.testing.assert_close(layer.get_delta_weight("default"), expected[:, : layer.in_features])
        before = layer.get_base_bias()
        if before is not None:
            before = before.clone()
            model.merge_adapter()
            torch.testing.assert_close(layer.get_base_bias() - before, expected[:, -1], atol=1e-6, rtol=1e-4)
            model.unmerge_adapter()


def test_vectors_clusters_and_bases():
    torch.manual_seed(1)
    matrix = torch.cat((torch.randn(20, 1) @ torch.randn(1, 9), 5 + torch.randn(15, 2) @ torch.randn(2, 9)))
    state = torch.get_rng_state()
    parts = left, _, right = leading_parts(matrix, 50, 2, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "it must not disturb the random numbers of others"
    assert left.shape == (35, 9) and right.shape == (9, 9)
    torch.testing.assert_close(left @ (left.T @ matrix), matrix, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(leading_parts(matrix, 50, 2, 3), parts, strict=True))
    clusters = cluster_rows(matrix, 2)
    assert torch.equal(torch.cat(clusters).sort().values, torch.arange(35))
    assert all(torch.equal(index, index.sort().values) for index in clusters)
    assert len(cluster_rows(matrix[:3], 5)) == 3
    plane = torch.randn(8, 2) @ torch.randn(2, 6)
    basis = cluster_basis(plane, 4, threshold=1e-4)
    assert basis.shape == (2, 6), "the other directions have nothing"
    torch.testing.assert_close(plane @ basis.T @ basis, plane, atol=1e-4, rtol=1e-4)
    assert cluster_basis(plane, 4).shape == (4, 6)
    assert cluster_basis(plane, 3, threshold=2.0).shape == (1, 6)
    blocks, rows = [torch.ones(1, 2), 2 * torch.ones(2, 1)], torch.tensor([1, 0, 2])
    assert spread_rows(blocks, rows).tolist() == [[0, 0, 2], [1, 1, 0], [0, 0, 2]]


def test_the_number_of_subspaces_falls():
    assert [budget_at(step, 10, 20, 100, 20, 1.0) for step in (10, 15, 20)] == [100, 60, 20]
    assert budget_at(15, 10, 20, 100, 20) == 30
    assert budget_at(21, 20, 20, 100, 20) == 20, "no steps between them"


@pytest.mark.parametrize("target, left", [(1, 1), (3, 2), (6, 6), (9, 6)])
def test_those_above_the_last_of_the_budget_are_trained_and_one_at_least(target, left):
    settings = {**ASA, "asa_target_subspaces": target, "init_warmup": 0, "final_warmup": 1, "mask_interval": 1}
    assert train(adapted(init_weights=None, **settings), 2)[-1] == left


def test_importance_is_measured_against_the_mean_so_far():
    mean, spread = torch.tensor([1.0]), torch.tensor([0.0])
    track_sensitivity(mean, spread, torch.tensor([-2.0]), torch.tensor([1.5]), 0.9, 0.5, before=True)
    torch.testing.assert_close(spread, torch.tensor([1.0]))
    torch.testing.assert_close(mean, torch.tensor([1.2]))


def train(model: nn.Module, steps: int) -> list[int]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for step in range(steps):
        x = torch.randn(8, 12, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        counts.append(sum(p.requires_grad for p in model.parameters()) // 2)
    return counts


ASA = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 4, "final_warmup": 12, "mask_interval": 4}


def test_subspaces_are_dropped_and_stay_so():
    model = adapted(init_weights=None, asa_schedule_exponent=1.0, **ASA)
    counts = train(model, 14)
    # At step 4 all are kept, at 8 those above the fourth, and at 12 there are no more than are asked for.
    assert counts == [6] * 8 + [3] * 6
    dropped = [
        parameter
        for layer in layers(model)
        for index in layer.adamss_dropped["default"]
        for parameter in layer.pairs("default")[index]
    ]
    assert len(dropped) == 2 * (6 - counts[-1])
    before = [parameter.clone() for parameter in dropped]
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    train(model, 2)
    assert all(torch.equal(*pair) for pair in zip(before, dropped, strict=True))
    assert not any(parameter.requires_grad for parameter in dropped)


def test_without_it_all_are_trained():
    assert train(adapted(init_weights=None), 14)[-1] == 6


def test_the_trainer_of_transformers_can_do_it():
    from peft.tuners.adamss.asa_callback import AdamssAsaCallback
    from transformers import TrainerCallback

    assert issubclass(AdamssAsaCallback, TrainerCallback)
    model = adapted(init_weights=None, asa_schedule_exponent=1.0, **ASA)
    for step in (4, 8):
        model(torch.randn(8, 12)).square().mean().backward()
        AdamssAsaCallback().on_optimizer_step(None, type("State", (), {"global_step": step}), None, model=model)
    assert sum(p.requires_grad for p in model.parameters()) < 12


@pytest.mark.parametrize("stored", [False, True])
def test_a_base_model_that_is_not_the_same(tmp_path, stored):
    model = adapted(init_weights=None, save_clusters=stored)
    model.save_pretrained(tmp_path)
    other = net()
    with torch.no_grad():
        for module in (other[0], other[2]):
            module.weight.copy_(module.weight.flip(0, 1) * torch.rand_like(module.weight))
    if not stored:
        with pytest.raises(RuntimeError, match=r"other clusters than those.*save_clusters=True"):
            peft.PeftModel.from_pretrained(other, tmp_path)
        return
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        for mine, theirs in zip(layers(model), layers(loaded), strict=True):
            torch.testing.assert_close(mine.get_delta_weight("default"), theirs.get_delta_weight("default"))
        other = loaded.unload()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init_weights": True}, "init_weights must be 'orthogonal' or None"),
        ({"num_subspaces": 0}, "num_subspaces must be a positive integer"),
        ({**ASA, "mask_interval": 0}, "mask_interval must be positive with use_asa"),
        ({**ASA, "asa_schedule_exponent": 0.0}, "asa_schedule_exponent must be positive"),
        ({**ASA, "final_warmup": 4}, "init_warmup=4 must be less than final_warmup=4"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        peft.AdamssConfig(target_modules=["0"], **settings)
    if settings.get("use_asa"):
        peft.AdamssConfig(target_modules=["0"], **{**settings, "use_asa": False})
