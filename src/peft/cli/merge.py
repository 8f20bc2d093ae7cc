"""`peft merge`: a base model with an adapter merged into its weights, as a model of its own."""

from __future__ import annotations

import os
from argparse import Namespace

from peft.cli.models import load_adapted


def run(args: Namespace) -> int:
    if os.path.isdir(args.output) and os.listdir(args.output):
        raise ValueError(f"--output {args.output}: the folder is not empty")
    model, tokenizer = load_adapted(args.adapter, model=args.model, dtype=args.dtype, device=args.device)
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(f"{args.adapter} is a soft prompt: there are no weights that it could be merged into")
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{type(merged).__name__} with {args.adapter} merged: {args.output}")
    return 0
