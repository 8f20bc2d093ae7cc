"""`peft convert`: LoRA files of other programs read, and written."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftConfig, load_peft_weights
from peft.checkpoint.files import write_adapter
from peft.cli.merge import check_empty
from peft.cli.options import Convert
from peft.lora_tools.formats import module_names, read_lora_file, write_lora_file


def run(options: Convert, *_: Any) -> int:
    if os.path.isfile(options.source):
        if not options.source.endswith((".safetensors", ".bin", ".pt", ".ckpt")):
            raise ValueError(f"{options.source}: LoRA files end with .safetensors, .bin, .pt or .ckpt")
        check_empty(options.output)
        names = module_names(options.model) if options.model else None
        config, tensors = read_lora_file(options.source, part=options.part, names=names)
        config.base_model_name_or_path = config.base_model_name_or_path or options.model
        config.inference_mode = True
        write_adapter(options.output, config.to_json_dict(), tensors)
    else:
        if options.to is None:
            raise ValueError("--to kohya or --to diffusers is needed to write an adapter for another program")
        if not options.output.endswith(".safetensors"):
            raise ValueError(f"--output {options.output}: a file is written, so its name must end with .safetensors")
        config, tensors = PeftConfig.from_pretrained(options.source), load_peft_weights(options.source, "cpu")
        write_lora_file(options.output, config, tensors, options.to, options.part or "unet")
    print(f"{len(tensors)} tensors: {options.output}")
    return 0
