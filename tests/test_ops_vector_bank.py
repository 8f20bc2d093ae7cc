"""Sums of bank vectors against their definition, and the logits in files."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.vector_bank import mix_vectors, pack_logits, unpack_logits


def draw(rows: int, vectors: int, length: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 2, vectors, dtype=torch.float64, generator=generator)
    return logits, torch.randn(vectors, length, dtype=torch.float64, generator=generator)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 5), st.data(), st.integers(0, 1000))
def test_mixture_is_the_weighted_sum_of_the_chosen(rows, vectors, length, data, seed):
    k = data.draw(st.integers(1, vectors))
    logits, bank = draw(rows, vectors, length, seed)
    mixed = mix_vectors(logits, bank, k)
    assert mixed.shape == (rows, 2, length)
    for row, part in ((0, 0), (rows - 1, 1)):
        chosen = sorted(range(vectors), key=lambda v: -logits[row, part, v].item())[:k]
        weights = logits[row, part, chosen].softmax(0)
        torch.testing.assert_close(mixed[row, part], sum(w * bank[v] for w, v in zip(weights, chosen, strict=True)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 8), st.data(), st.integers(0, 1000))
def test_packed_logits_mix_the_same_and_pack_the_same_again(rows, vectors, data, seed):
    k = data.draw(st.integers(1, vectors))
    logits, bank = draw(rows, vectors, 3, seed)
    places, weights = pack_logits(logits, k)
    assert places.shape == (rows, 2, k) and weights.shape == (rows, 2, k - 1)
    again = unpack_logits(places, weights, vectors)
    torch.testing.assert_close(mix_vectors(again, bank, k), mix_vectors(logits, bank, k))
    assert ((again == -torch.inf).sum(-1) == vectors - k).all()
    assert torch.equal(pack_logits(again, k)[0], places)


def test_places_are_kept_in_the_smallest_integers():
    for vectors, dtype in ((255, torch.uint8), (256, torch.int16), (2**15, torch.int32)):
        assert pack_logits(torch.randn(1, vectors), 2)[0].dtype == dtype


def test_gradient_reaches_the_chosen_only():
    logits, bank = draw(2, 5, 3, 0)
    logits.requires_grad_()
    bank.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits, bank: mix_vectors(logits, bank, 2), (logits, bank))
    mix_vectors(logits, bank, 2).square().sum().backward()
    assert ((logits.grad != 0).sum(-1) == 2).all()
