"""Settings that make no sense are refused by the configuration, or where only the model shows it, before any change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from tiny_models import MLP, assert_same_state, state

over = pytest.mark.parametrize
CPT = dict(task_type="CAUSAL_LM", cpt_token_ids=[5, 6])
ADALORA = dict(total_step=10)

OUT_OF_RANGE = [
    (peft.HRAConfig, dict(r=0), "r must be a positive integer"),
    (peft.VeraConfig, dict(r=-1), "r must be a positive integer"),
    (peft.VeraConfig, dict(vera_dropout=1.0), "vera_dropout"),
    (peft.LoHaConfig, dict(r=0), "r must be a positive integer"),
    (peft.LoHaConfig, dict(alpha=-1), "alpha must be non-negative"),
    (peft.LoHaConfig, dict(rank_dropout=-0.1), "rank_dropout"),
    (peft.LoHaConfig, dict(rank_pattern={"0": 0}), "rank"),
    (peft.LoKrConfig, dict(module_dropout=1.5), "module_dropout"),
    (peft.LoKrConfig, dict(decompose_factor=0), "decompose_factor"),
    (peft.LoKrConfig, dict(init_weights="zeros"), "init_weights"),
    (peft.OFTConfig, dict(r=2, oft_block_size=2), "and 0 for the other"),
    (peft.OFTConfig, dict(r=0, oft_block_size=0), "and 0 for the other"),
    (peft.OFTConfig, dict(r=-2, oft_block_size=0), "non-negative"),
    (peft.OFTConfig, dict(module_dropout=1.0), "module_dropout"),
    (peft.OFTConfig, dict(num_cayley_neumann_terms=0), "num_cayley_neumann_terms"),
    (peft.OFTConfig, dict(eps=0.0), "eps must be positive"),
    (peft.BOFTConfig, dict(boft_block_size=0), "and 0 for the other"),
    (peft.BOFTConfig, dict(boft_block_size=4, boft_block_num=2), "and 0 for the other"),
    (peft.BOFTConfig, dict(boft_n_butterfly_factor=0), "boft_n_butterfly_factor"),
    (peft.BOFTConfig, dict(boft_dropout=-1.0), "boft_dropout"),
    (peft.ShiraConfig, dict(r=0), "r must be a positive integer"),
    (peft.MissConfig, dict(r=0), "r must be a positive integer"),
    (peft.MissConfig, dict(mini_r=0), "mini_r"),
    (peft.MissConfig, dict(miss_dropout=1.0), "miss_dropout"),
    (peft.MissConfig, dict(init_weights="bats"), "init_weights"),
    (peft.FourierFTConfig, dict(n_frequency=0), "n_frequency"),
    (peft.FourierFTConfig, dict(n_frequency_pattern={"0": -1}), "n_frequency"),
    (peft.RandLoraConfig, dict(r=0), "r must be a positive integer"),
    (peft.RandLoraConfig, dict(randlora_alpha=-1), "randlora_alpha must be non-negative"),
    (peft.RandLoraConfig, dict(randlora_dropout=2.0), "randlora_dropout"),
    (peft.VBLoRAConfig, dict(topk=0), "topk"),
    (peft.VBLoRAConfig, dict(num_vectors=2, topk=3), "more than the vectors"),
    (peft.VBLoRAConfig, dict(vector_length=-4), "vector_length"),
    (peft.VBLoRAConfig, dict(vblora_dropout=1.0), "vblora_dropout"),
    (peft.AdaLoraConfig, dict(), "total_step"),
    (peft.AdaLoraConfig, dict(init_r=0, **ADALORA), "init_r"),
    (peft.AdaLoraConfig, dict(target_r=-1, **ADALORA), "target_r must be non-negative"),
    (peft.AdaLoraConfig, dict(tinit=-1, **ADALORA), "tinit must be non-negative"),
    (peft.AdaLoraConfig, dict(tinit=6, tfinal=5, **ADALORA), "leave none"),
    (peft.AdaLoraConfig, dict(beta1=1.0, **ADALORA), "beta1"),
    (peft.AdaLoraConfig, dict(lora_dropout=-0.5, **ADALORA), "lora_dropout"),
    (peft.PolyConfig, dict(n_tasks=0), "n_tasks"),
    (peft.PolyConfig, dict(r=-8), "r must be a positive integer"),
    (peft.PromptTuningConfig, dict(num_virtual_tokens=0), "num_virtual_tokens"),
    (peft.PromptTuningConfig, dict(num_virtual_tokens=4, prompt_tuning_init="words"), "prompt_tuning_init"),
    (peft.PromptEncoderConfig, dict(num_virtual_tokens=-1), "num_virtual_tokens"),
    (peft.PromptEncoderConfig, dict(encoder_num_layers=0), "encoder_num_layers"),
    (peft.PrefixTuningConfig, dict(encoder_hidden_size=0), "encoder_hidden_size"),
    (peft.MultitaskPromptTuningConfig, dict(num_ranks=0), "num_ranks"),
    (peft.MultitaskPromptTuningConfig, dict(prompt_tuning_init_task=-1), "prompt_tuning_init_task"),
    (peft.CPTConfig, dict(opt_projection_epsilon=-1.0, **CPT), "opt_projection_epsilon must be non-negative"),
    (peft.AdaptionPromptConfig, dict(adapter_layers=0), "adapter_layers"),
]


@over("config, settings, words", OUT_OF_RANGE)
def test_numbers_and_choices_out_of_range(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


@over(
    "config, settings",
    [
        (peft.LoraConfig, dict(r="8")),
        (peft.LoraConfig, dict(r=8.0)),
        (peft.LoraConfig, dict(use_dora="yes")),
        (peft.LoraConfig, dict(rank_pattern=["q_proj"])),
        (peft.LoraConfig, dict(modules_to_save="score")),
        (peft.LoraConfig, dict(target_modules=3)),
        (peft.HRAConfig, dict(r=True)),
        (peft.OFTConfig, dict(init_weights="zeros")),
        (peft.VeraConfig, dict(vera_dropout="0.1")),
        (peft.ShiraConfig, dict(random_seed="7")),
        (peft.PrefixTuningConfig, dict(num_virtual_tokens=2.5)),
        (peft.TrainableTokensConfig, dict(token_indices=5)),
        (peft.CPTConfig, dict(cpt_token_ids="5 6", task_type="CAUSAL_LM")),
    ],
)
def test_values_of_another_type(config, settings):
    with pytest.raises(TypeError, match=f"{next(iter(settings))}.* must be"):
        config(**settings)


def test_types_that_stand_for_each_other():
    config = peft.LoraConfig(lora_alpha=0.5, lora_dropout=0, target_modules=("lin0",), layers_to_transform=None)
    assert config.lora_alpha == 0.5 and config.target_modules == {"lin0"}
    assert peft.VBLoRAConfig(init_logits_std=1).init_logits_std == 1


@over(
    "config, settings, words",
    [
        (peft.BOFTConfig, dict(boft_block_size=5), "does not fit"),
        (peft.BOFTConfig, dict(boft_block_size=0, boft_block_num=3), "does not fit"),
        (peft.VBLoRAConfig, dict(vector_length=7), "vector_length"),
        (peft.FourierFTConfig, dict(n_frequency=10**6), "n_frequency"),
        (peft.PolyConfig, dict(n_splits=5), "n_splits"),
        (peft.MissConfig, dict(r=4, init_weights="mini", mini_r=7), "mini_r"),
        (peft.ShiraConfig, dict(r=100), "r"),
        (peft.TrainableTokensConfig, dict(token_indices=[1], target_modules=["act"]), "not supported"),
        (peft.LNTuningConfig, dict(target_modules=["act"]), "not supported"),
        (peft.LoHaConfig, dict(target_modules=["lin9"]), "not found"),
    ],
)
def test_what_does_not_fit_the_model_leaves_it_as_it_was(config, settings, words):
    model = MLP()
    before = state(model)
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(model, config(**{"target_modules": ["lin0"], **settings}))
    assert_same_state(model, before)


def test_trained_tokens_have_to_be_named():
    model = nn.Sequential(nn.Embedding(8, 4))
    before = state(model)
    with pytest.raises(ValueError, match="token_indices is empty"):
        peft.get_peft_model(model, peft.TrainableTokensConfig(target_modules=["0"]))
    assert_same_state(model, before)
    torch.testing.assert_close(model(torch.tensor([1])), model[0].weight[1:2])


@pytest.mark.parametrize("peft_type", list(peft.PeftType))
def test_a_method_by_its_name_has_the_defaults(peft_type):
    needed = {"ADALORA": {"total_step": 100}, "CPT": {"task_type": "CAUSAL_LM"}}.get(peft_type.value, {})
    config = peft.PeftConfig.from_peft_type(peft_type=peft_type, **needed)
    assert config.to_dict() == type(config)(**needed).to_dict() and config.peft_type == peft_type
