"""`peft generate`: text from a model with an adapter."""

from __future__ import annotations

import sys
from argparse import Namespace

from peft.cli.models import load_adapted, write_text


def run(args: Namespace) -> int:
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = load_adapted(args.adapter, model=args.model, dtype=args.dtype, device=args.device)
    text = write_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    print(text)
    return 0
