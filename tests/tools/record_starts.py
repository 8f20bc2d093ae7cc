"""The start values that a seed means, of every method: those of huggingface/peft, recorded in tests/data/starts.json.

    PYTHONPATH=WHERE_THE_REFERENCE_IS python tests/tools/record_starts.py

The test of the same values is in tests/test_starts.py.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import llama

DATA = Path(__file__).parents[1] / "data" / "starts.json"
TWO = {"target_modules": ["up", "down"]}
LORA = {"r": 4, **TWO}
PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
#: configuration class and settings; those that target nothing, or q_proj, are for a small Llama.
#: FRoD's basis is unique, up to signs, where several square matrices share it; else rounding decides.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdaLoraConfig", {"init_r": 4, "total_step": 10, **TWO}),
    ("AdaLoraConfig", {"init_r": 4, "total_step": 10, "init_lora_weights": False, **TWO}),
    ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}),
    ("BeftConfig", {"target_modules": ["up"], "init_weights": False}),
    ("BOFTConfig", {"boft_block_size": 2, "init_weights": False, **TWO}),
    ("C3AConfig", {"block_size": 4, **TWO}),
    ("CartridgeConfig", PROMPT),
    ("DeftConfig", {"r": 4, **TWO}),
    ("DeloraConfig", {"r": 4, **TWO}),
    ("FourierFTConfig", {"n_frequency": 20, **TWO}),
    ("FrodConfig", {"sparse_rate": 0.1, "init_weights": False, "progressbar": False, "target_modules": ["q_proj"]}),
    ("GloraConfig", {"r": 2, "init_weights": False, **TWO}),
    ("GraloraConfig", {"r": 4, "hybrid_r": 2, **TWO}),
    ("HiraConfig", {"r": 4, **TWO}),
    ("HRAConfig", {"r": 4, **TWO}),
    ("HRAConfig", {"r": 3, "init_weights": False, **TWO}),
    ("IA3Config", {"feedforward_modules": ["down"], "init_ia3_weights": False, **TWO}),
    ("LilyConfig", {"r": 4, **TWO}),
    ("LoHaConfig", {"r": 2, **TWO}),
    ("LoHaConfig", {"r": 2, "use_effective_conv2d": True, "target_modules": ["conv"]}),
    ("LoHaConfig", {"r": 2, "init_weights": False, **TWO}),
    ("LoKrConfig", {"r": 2, **TWO}),
    ("LoKrConfig", {"r": 2, "use_effective_conv2d": True, "target_modules": ["conv"], "init_weights": False}),
    ("LoKrConfig", {"r": 2, "decompose_both": True, "init_weights": "lycoris", **TWO}),
    ("LoraConfig", LORA),
    ("LoraConfig", {**LORA, "lora_bias": True, "init_lora_weights": False}),
    ("LoraConfig", {**LORA, "init_lora_weights": "gaussian"}),
    ("LoraConfig", {**LORA, "init_lora_weights": "orthogonal"}),
    ("LoraConfig", {**LORA, "init_lora_weights": "eva"}),
    ("LoraConfig", {**LORA, "use_dora": True}),
    ("LoraConfig", {**LORA, "target_modules": ["tokens", "conv"]}),
    ("LoraConfig", {**LORA, "target_modules": ["tokens"], "init_lora_weights": "olora"}),
    ("LoraConfig", {**LORA, "target_modules": ["up"], "target_parameters": ["experts.first"]}),
    ("MissConfig", {"r": 4, "init_weights": False, **TWO}),
    ("MultitaskPromptTuningConfig", {**PROMPT, "num_tasks": 2}),
    ("OFTConfig", {"oft_block_size": 4, "init_weights": False, **TWO}),
    ("PeanutConfig", {"r": 4, "depth": 1, **TWO}),
    ("PolyConfig", {"r": 2, "n_tasks": 2, "n_skills": 2, "init_weights": False, **TWO}),
    ("PrefixTuningConfig", PROMPT),
    ("PrefixTuningConfig", {**PROMPT, "prefix_projection": True, "encoder_hidden_size": 8}),
    ("PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 8}),
    ("PromptTuningConfig", PROMPT),
    ("PveraConfig", {"r": 4, "init_weights": False, **TWO}),
    ("RandLoraConfig", {"r": 4, "init_weights": False, **TWO}),
    ("RoadConfig", {"group_size": 4, "init_weights": False, **TWO}),
    ("ShiraConfig", {"r": 2, "init_weights": False, **TWO}),
    ("SupertuningConfig", {"sparsity": 0.8, "r": 2, "init_weights": False, **TWO}),
    ("TinyLoraConfig", {"r": 2, "u": 6, "init_weights": "uniform", **TWO}),
    ("UniLoraConfig", {"r": 2, "theta_d_length": 20, **TWO}),
    ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 4, **TWO}),
    ("VeraConfig", {"r": 4, "init_weights": False, **TWO}),
    ("WaveFTConfig", {"n_frequency": 20, "init_weights": False, **TWO}),
]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 8, 12))


class Net(nn.Module):
    """One module of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.tokens = Experts(), nn.Embedding(16, 8)
        self.up, self.down, self.conv = nn.Linear(8, 12), nn.Linear(12, 8), nn.Conv2d(4, 8, 3)


def starts(library: Any, name: str, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Sums of sizes and of squares of each tensor that a new adapter has, by its name in files."""
    torch.manual_seed(0)
    net = llama() if "q_proj" in settings.get("target_modules", ["q_proj"]) else Net()
    config = getattr(library, name)(**copy.deepcopy(settings))
    torch.manual_seed(1)
    model = library.get_peft_model(net, config)
    tensors: dict[str, Tensor] = library.get_peft_model_state_dict(model)
    return {
        key: [tensor.double().abs().sum().item(), tensor.double().square().sum().item()]
        for key, tensor in sorted(tensors.items())
    }


def main() -> None:
    import peft

    rows = [json.dumps([name, settings, starts(peft, name, settings)]) for name, settings in CASES]
    DATA.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
