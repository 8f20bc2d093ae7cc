"""What a method adapts where `target_modules` is not given: a table per method, from model type to targets.

A list holds names or their last parts, a string is a regular expression, as in `target_modules` itself. The tables
are plain dictionaries: an entry added to one is used from then on, by that method alone.
"""

from __future__ import annotations

Targets = dict[str, "list[str] | str"]


def _table(rows: dict[str, str]) -> Targets:
    """Rows `targets: model types`, names separated by blanks, as a mapping from model type to its list of targets."""
    return {model_type: targets.split() for targets, model_types in rows.items() for model_type in model_types.split()}


_VISION_LANGUAGE: Targets = {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}

_QUERY_AND_VALUE = _VISION_LANGUAGE | _table(
    {
        "q_proj v_proj": (
            "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3 stablelm"
        ),
        "q v": "mt5 t5",
        "q v q_proj v_proj": "blip-2",
        "query value": "bert electra layoutlm roberta xlm-roberta",
        "query_proj value_proj": "deberta-v2",
        "query_key_value": "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
        "in_proj": "deberta",
        "c_attn": "gpt2 gpt_bigcode",
        "c_proj c_attn": "btlm",
        "Wqkv": "mpt",
        "qkv_proj": "codegen",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
    }
)
_LORA = _QUERY_AND_VALUE | _table({"q_proj v_proj fc1 fc2": "phi"})
_C3A = _LORA | _table({"mlp.c_proj": "gpt2 gpt_bigcode"})

_ADALORA = _VISION_LANGUAGE | _table(
    {
        "q k v o wi wo": "t5",
        "q k v o wi_0 wi_1 wo": "mt5",
        "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
        "q_proj v_proj": "gemma gemma2 gemma3_text gpt_neo gptj llama llama4 qwen2 qwen3",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "query value": "bert",
        "query key value dense": "roberta",
        "query_proj key_proj value_proj dense": "deberta-v2",
        "query_key_value": "bloom gpt_neox",
        "in_proj": "deberta",
        "c_attn": "gpt2 gpt_bigcode",
    }
)

_BEFT = _table(
    {
        "v": "mt5 t5",
        "v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3",
        "value": "bert roberta",
        "value_proj": "deberta-v2",
    }
)

_IA3 = _table(
    {
        "k v wo": "t5",
        "k v wi_1": "mt5",
        "k_proj v_proj down_proj": "llama mistral",
        "k_proj v_proj w2": "mixtral",
        "q_proj v_proj down_proj": "gemma gemma2 gemma3_text llama4 qwen2 qwen3",
        "q_proj v_proj fc2": "bart phi",
        "q_proj k_proj fc2": "opt",
        "q_proj v_proj fc_out": "gptj",
        "q_proj v_proj c_proj": "gpt_neo",
        "key value output.dense": "bert roberta",
        "key_proj value_proj output.dense": "deberta-v2",
        "in_proj output.dense": "deberta",
        "query_key_value dense_4h_to_h": "RefinedWeb RefinedWebModel falcon gpt_neox",
        "query_key_value mlp.dense_4h_to_h": "bloom",
        "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
    }
)

_LN_TUNING = _table(
    {
        "input_layernorm post_attention_layernorm norm": "gemma llama mistral",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": (
            "gemma2 gemma3_text"
        ),
        "post_attention_layernorm": "qwen2 qwen3",
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
        "input_layernorm final_layernorm": "phi",
        "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
        "layer_norm final_layer_norm": "mt5 t5",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "ln_1 ln_2 ln_f": "gpt2",
        "ln_1 ln_f": "gptj",
    }
)

_OSF = _table(
    {
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": (
            "gemma gemma2 gemma3_text llama llama4 mistral mixtral phi qwen2 qwen3"
        ),
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        "query_key_value dense_4h_to_h": "bloom falcon gpt_neox",
        "c_attn c_proj": "gpt2 gpt_bigcode",
    }
)

_LIKE_LORA = (
    "BOFT DEFT DELORA GLORA GRALORA HIRA HRA LILY LOHA LOKR LORA MISS OFT PEANUT POLY PSOFT RANDLORA ROAD SUPERTUNING"
    " TINYLORA UNILORA"
)

#: peft type -> model type -> what to adapt
DEFAULT_TARGETS: dict[str, Targets] = {
    **{method: dict(_LORA) for method in _LIKE_LORA.split()},
    "ADALORA": _ADALORA,
    "ADAMSS": _LORA | _table({"query value": "vit"}),
    "BEFT": _BEFT,
    "C3A": _C3A,
    "FOURIERFT": dict(_C3A),
    "FROD": _QUERY_AND_VALUE | _table({"query value": "vit"}),
    "IA3": _IA3,
    "LN_TUNING": _LN_TUNING,
    "OSF": _OSF,
    "PVERA": _QUERY_AND_VALUE | _table({"query value": "dinov2"}),
    "SHIRA": dict(_QUERY_AND_VALUE),
    "VBLORA": _ADALORA | _table({"query value": "roberta"}),
    "VERA": dict(_QUERY_AND_VALUE),
    "WAVEFT": {model_type: names for model_type, names in _C3A.items() if model_type not in ("btlm", "rwkv", "rwkv7")},
}

#: model type -> those of IA3's targets whose input is scaled rather than their output
FEEDFORWARD_TARGETS: Targets = {"mt5": []} | _table(
    {
        "wo": "t5",
        "down_proj": "gemma gemma2 gemma3_text llama llama4 mistral qwen2 qwen3",
        "w2": "mixtral",
        "fc2": "bart opt phi",
        "fc_out": "gptj",
        "c_proj": "gpt_neo",
        "output.dense": "bert deberta deberta-v2 roberta",
        "dense_4h_to_h": "RefinedWeb RefinedWebModel falcon gpt_neox",
        "mlp.dense_4h_to_h": "bloom",
        "mlp.c_proj": "gpt2 gpt_bigcode",
    }
)

#: classes of modules that only call a linear layer and clip what goes in and comes out, and what they call it
LINEAR_INSIDE = {"Gemma4ClippableLinear": "linear", "DiffusionGemmaClippableLinear": "linear"}
