"""`peft merge`: a base model with adapters merged into its weights, as a model of its own."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from peft.cli import models
from peft.cli.options import refuse
from peft.core.part import Part
from peft.registry import value_of


def run(options: Any, *_: Any) -> None:
    models.check_empty(options.output)
    first, *others = options.adapters
    weights = options.weights or [1.0] * len(options.adapters)
    uneven = len(weights) != len(options.adapters)
    refuse(uneven, f"--weights: {len(weights)} of them for {len(options.adapters)} adapters")
    with TemporaryDirectory() as folder:
        where: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": folder} if options.by_shard else {}
        model = models.load_adapted(first, options, plain=True, **where)
        tokenizer = models.tokenizer_of(first, model)
        for number, path in enumerate(others):
            model.load_adapter(path, f"adapter{number}")
        names, config = list(model.peft_config), model.active_peft_config  # of one method, as all that go together
        soft = config.is_prompt_learning
        refuse(soft, "a soft prompt is not merged: there are no weights that it could be merged into")
        if any(weight != 1 for weight in weights):
            method = value_of(config.peft_type)
            refuse(method != "LORA", f"--weights are for LoRA, not for {method}")
            model.add_weighted_adapter(names, weights, "weighted", combination_type="cat")
            names = ["weighted"]
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        if options.by_shard and any(isinstance(end, Part) for end in ends):
            model.config.tie_word_embeddings = False  # of weights on the disk it is not seen that they are no more
        merged = model.merge_and_unload(safe_merge=True, adapter_names=names)
        merged.save_pretrained(options.output, max_shard_size="2GB")  # one file's weights are in memory at a time
    tokenizer.save_pretrained(options.output)
    print(f"{type(merged).__name__} with {', '.join(options.adapters)} merged: {options.output}")
