"""TinyLoRA, Uni-LoRA, Lily, FRoD and OSF: what is special about each."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft
from peft.ops.singular import leading_factors

torch.set_num_threads(1)


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def saved(model: peft.PeftModel, folder) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


# ---- TinyLoRA


def test_leading_factors_are_the_best_approximation_and_balanced():
    matrix = torch.randn(7, 5, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    b, a = leading_factors(matrix, 2)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix - b @ a), values[2:].norm())
    torch.testing.assert_close(b.T @ b, torch.diag(values[:2]))
    torch.testing.assert_close(a @ a.T, torch.diag(values[:2]))
    assert leading_factors(matrix, 9)[1].shape == (5, 5)


def tiny(**settings) -> peft.TinyLoraConfig:
    return peft.TinyLoraConfig(target_modules=["0", "1", "2", "3"], **{"u": 3, "init_weights": "uniform", **settings})


@pytest.mark.parametrize("tying, groups", [(0.0, [0, 1, 2, 3]), (0.3, [0, 1, 2, 2]), (0.5, [0, 0, 1, 1]), (1, [0] * 4)])
def test_tinylora_ties_vectors_of_neighbours(tying, groups):
    model = peft.get_peft_model(chain(8, 6, 8, 6, 8), tiny(weight_tying=tying))
    vectors = [next(iter(layer.adapter_parameters("default"))) for layer in model.base_model.layers()]
    for i, vector in enumerate(vectors):
        assert [vector is other for other in vectors] == [group == groups[i] for group in groups]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(set(groups)) and all(parameter.shape == (3,) for parameter in trained)


def test_tinylora_changes_the_weight_within_its_leading_part():
    net = chain(8, 6, 8)
    model = peft.get_peft_model(net, peft.TinyLoraConfig(target_modules=["0", "1"], u=5, r=3, init_weights="uniform"))
    for layer in model.base_model.layers():
        left, _, right = torch.linalg.svd(layer.original_weight(), full_matrices=False)
        delta = layer.get_delta_weight("default").detach()
        assert delta.abs().max() > 1e-4
        inside = left[:, :3] @ left[:, :3].T @ delta @ right[:3].T @ right[:3]
        torch.testing.assert_close(inside, delta)


def test_a_loaded_tinylora_needs_no_decomposition_unless_its_file_lacks_factors(tmp_path, monkeypatch):
    model = peft.get_peft_model(chain(8, 6, 8, 6, 8), tiny())
    x = torch.randn(2, 8)
    tensors = saved(model, tmp_path)
    made = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **kw: made.append(m.is_meta) or svd(m, **kw))
    assert torch.equal(peft.PeftModel.from_pretrained(chain(8, 6, 8, 6, 8), tmp_path)(x), model(x))
    assert made and all(made)
    left_out = {k: v for k, v in tensors.items() if not k.endswith(("0.tinylora_A", "1.tinylora_P"))}
    save_file(left_out, tmp_path / "adapter_model.safetensors")
    made.clear()
    with pytest.warns(peft.errors.PeftWarning, match="has no value for"):
        loaded = peft.PeftModel.from_pretrained(chain(8, 6, 8, 6, 8), tmp_path)
    assert made.count(False) == 1  # of layer 0; the projections come from the seed
    assert torch.equal(loaded(x), model(x))


def test_what_a_tinylora_does_not_store_it_draws_again(tmp_path):
    model = peft.get_peft_model(chain(8, 6, 8, 6, 8), tiny(save_projection=False))
    assert not any(key.endswith("tinylora_P") for key in saved(model, tmp_path))
    x = torch.randn(2, 8)
    assert torch.equal(peft.PeftModel.from_pretrained(chain(8, 6, 8, 6, 8), tmp_path)(x), model(x))


def test_tinylora_refuses_what_it_cannot_mean():
    for wrong in ({"weight_tying": 1.5}, {"init_weights": "zeros"}, {"r": 0}, {"u": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tiny(**wrong)
    with pytest.raises(ValueError, match="tinylora_dropout needs linear layers"):
        config = peft.TinyLoraConfig(target_modules=["0"], tinylora_dropout=0.5)
        peft.get_peft_model(nn.Sequential(nn.Embedding(9, 4)), config)
