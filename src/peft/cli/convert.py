"""`peft convert`: LoRA files of other programs read, and written."""

from __future__ import annotations

import os
from argparse import Namespace

from peft import PeftConfig, load_peft_weights
from peft.checkpoint.files import write_adapter
from peft.checkpoint.formats import module_names, read_lora_file, write_lora_file


def run(args: Namespace) -> int:
    if os.path.isfile(args.source):
        names = module_names(args.model) if args.model else None
        config, tensors = read_lora_file(args.source, part=args.part, names=names)
        if os.path.isdir(args.output) and os.listdir(args.output):
            raise ValueError(f"--output {args.output}: the folder is not empty")
        config.base_model_name_or_path = config.base_model_name_or_path or args.model
        config.inference_mode = True
        write_adapter(args.output, config.to_json_dict(), tensors)
    else:
        if args.to is None:
            raise ValueError("--to kohya or --to diffusers is needed to write an adapter for another program")
        if not args.output.endswith(".safetensors"):
            raise ValueError(f"--output {args.output}: a file is written, so its name must end with .safetensors")
        config = PeftConfig.from_pretrained(args.source)
        tensors = load_peft_weights(args.source, "cpu")
        write_lora_file(args.output, config, tensors, args.to, args.part or "unet")
    print(f"{len(tensors)} tensors: {args.output}")
    return 0
