"""The arguments of the commands, and the YAML file of `peft train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from peft.cli.fields import OptionError, assignments, nearest
from peft.registry import METHODS

#: settings of a run, written into its folder; what `--resume` reads
SETTINGS = "train.yaml"


def _method(text: str) -> str:
    name = text.upper().replace("-", "_")
    if name not in METHODS:
        hint = nearest(name.lower(), map(str.lower, METHODS))
        known = ", ".join(sorted(METHODS)).lower()
        raise argparse.ArgumentTypeError(f"unknown method {text!r}{hint or '.'} There are {known}")
    return name.lower()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, got {text!r}")
    return int(text)


def _train(parser: argparse.ArgumentParser) -> None:
    flag = argparse.BooleanOptionalAction
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", help="transformers model, folder or hub id [a tiny one, made on the spot]")
    what.add_argument("--base-steps", type=_count, metavar="N", help="how long the tiny one is made, in steps")
    what.add_argument("--method", default="lora", type=_method, metavar="NAME", help="the method [lora]")
    what.add_argument("--fields", action="store_true", help="list the fields of the method's configuration, and exit")
    what.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="set a field, as --FIELD VALUE does"
    )
    what.add_argument("--config", metavar="FILE", help="YAML file of options and fields; the command line overrides it")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", nargs="+", metavar="FILE", help="text, .jsonl or .json files [the source of Python's library]"
    )
    data.add_argument("--eval-data", nargs="+", metavar="FILE", help="files to evaluate on, in place of --eval-split")
    data.add_argument("--eval-split", type=float, default=0.05, metavar="SHARE", help="share that is held out [0.05]")
    data.add_argument("--text-field", default="text", metavar="NAME", help="JSON field of a text to learn [text]")
    data.add_argument("--prompt-field", default="prompt", metavar="NAME", help="JSON field of what is given [prompt]")
    data.add_argument("--completion-field", default="completion", metavar="NAME", help="and of the answer [completion]")
    data.add_argument("--block-size", type=_count, default=256, metavar="N", help="tokens of one example at most [256]")

    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=float, default=1.0, metavar="N", help="passes over the data [1]")
    how.add_argument("--max-steps", type=_count, metavar="N", help="optimizer steps, in place of --epochs")
    how.add_argument("--batch-size", type=_count, default=8, metavar="N", help="examples of one forward pass [8]")
    how.add_argument("--grad-accum", type=_count, default=1, metavar="N", help="forward passes of one step [1]")
    how.add_argument("--lr", type=float, default=1e-3, help="highest learning rate [0.001]")
    how.add_argument("--schedule", default="linear", metavar="NAME", help="linear, cosine, constant, ... [linear]")
    how.add_argument(
        "--warmup-steps", type=int, default=0, metavar="N", help="steps up to the highest learning rate [0]"
    )
    how.add_argument("--weight-decay", type=float, default=0.0, metavar="W", help="of AdamW [0]")
    how.add_argument("--max-grad-norm", type=float, default=1.0, metavar="X", help="gradients are cut to this norm [1]")
    how.add_argument("--bf16", action=flag, default=False, help="base model and computation in bfloat16")
    how.add_argument("--gradient-checkpointing", action=flag, default=False, help="less memory for more time")
    how.add_argument("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is random [0]")

    out = parser.add_argument_group("what comes out")
    out.add_argument("--output", default="adapter", metavar="DIR", help="for adapter, log and loss curve [adapter]")
    out.add_argument("--eval-steps", type=_count, metavar="N", help="evaluate every N steps [a tenth of the run]")
    out.add_argument("--save-steps", type=_count, metavar="N", help="checkpoint every N steps [when it evaluates]")
    out.add_argument("--resume", action="store_true", help="go on with the run in --output, by its settings")
    out.add_argument("--overwrite", action="store_true", help="replace the run in --output")


def _adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="saved adapter, folder or hub id")


def _with_base(parser: argparse.ArgumentParser) -> None:
    _adapter(parser)
    parser.add_argument("--model", help="base model [the one that the adapter names]")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 [as the base model is stored]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")


def _generate(parser: argparse.ArgumentParser) -> None:
    _with_base(parser)
    parser.add_argument("--prompt", default="-", metavar="TEXT", help="text to go on from; - is standard input [-]")
    parser.add_argument(
        "--max-new-tokens", type=_count, default=100, metavar="N", help="longest answer, in tokens [100]"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token [0]")
    parser.add_argument("--top-k", type=int, default=50, metavar="K", help="draw from the K likeliest tokens [50]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw [0]")


def _merge(parser: argparse.ArgumentParser) -> None:
    _with_base(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="for the merged model and its tokenizer")


def _extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the model before fine-tuning, folder or hub id")
    parser.add_argument("tuned", metavar="TUNED", help="the model after it")
    parser.add_argument("--output", required=True, metavar="DIR", help="for the adapter")
    parser.add_argument("--rank", type=_count, default=16, metavar="R", help="rank of the LoRA [16]")
    parser.add_argument("--energy", type=float, metavar="SHARE", help="share of a change to keep, in place of --rank")
    parser.add_argument("--target-modules", metavar="NAMES", help="layers, divided by commas [all linear ones]")
    parser.add_argument("--modules-to-save", metavar="NAMES", help="modules to take over whole, divided by commas")
    parser.add_argument("--task-type", metavar="TASK", help="CAUSAL_LM, SEQ_CLS, ... [as the model is]")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 [as the models are stored]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a LoRA file of kohya's or diffusers', or a saved adapter")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder of the adapter, or the file")
    parser.add_argument("--to", choices=("kohya", "diffusers"), help="write an adapter for that program")
    parser.add_argument("--part", metavar="NAME", help="part of a pipeline: unet, text_encoder, transformer, ...")
    parser.add_argument("--model", metavar="DIR", help="folder of the base model, whose names kohya's files need")


def _inspect(parser: argparse.ArgumentParser) -> None:
    _adapter(parser)
    parser.add_argument("--json", action="store_true", help="everything as JSON, down to the single tensor")
    parser.add_argument("--png", metavar="FILE", help="for the picture [NAME-norms.png; none with --json]")


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="peft-demo", metavar="DIR", help="for everything it makes [peft-demo]")
    parser.add_argument("--base-steps", type=_count, metavar="N", help="steps of making the base model")
    parser.add_argument("--steps", type=_count, metavar="N", help="steps of fine-tuning it")


#: per command: a line of help, its arguments, the packages it needs beyond the library's own
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], tuple[str, ...]]] = {
    "train": ("fine-tune a model and save the adapter", _train, ("transformers", "matplotlib", "rich")),
    "generate": ("write text with an adapter", _generate, ("transformers",)),
    "merge": ("write the base model with an adapter merged into it", _merge, ("transformers",)),
    "extract": ("make a LoRA of a fine-tuned model and its base", _extract, ("transformers",)),
    "convert": ("read or write LoRA files of kohya's scripts and diffusers", _convert, ()),
    "inspect": ("show what a saved adapter holds", _inspect, ("matplotlib", "rich")),
    "demo": ("train, save, load and merge a LoRA in two minutes", _demo, ("transformers", "matplotlib", "rich")),
}

TRAIN_EPILOG = """\
Every field of the method's configuration is an option too:
  peft train --model facebook/opt-350m --data notes.txt --method lora --r 16 --target_modules q_proj,v_proj
`peft train --method NAME --fields` lists them.
"""


def add_arguments(command: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """`parser` with the arguments of `command`."""
    summary, arguments, _ = COMMANDS[command]
    parser.description = summary[0].upper() + summary[1:] + "."
    parser.allow_abbrev = False
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)
    arguments(parser)
    if command == "train":
        parser.usage = "peft train [OPTION ...] [--FIELD VALUE ...]"
        parser.epilog = TRAIN_EPILOG
    return parser


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a parser, as on the command line."""
    return [text for action in parser._actions for text in action.option_strings if text.startswith("--")]


def read_train(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(the options of `peft train`, the fields of the method's configuration), from `argv` and the YAML file.

    The file is `--config`; with `--resume` and no such option it is the one that the broken-off run has written.

    Raises:
        OptionError: something in them cannot be read.
    """
    args, rest = parser.parse_known_args(argv)
    fields: dict[str, Any] = {}
    if args.resume and args.config is None:
        args.config = os.path.join(args.output, SETTINGS)
        if not os.path.isfile(args.config):
            raise OptionError(f"--resume: no run in {args.output!r} (there is no {SETTINGS}); start one without it")
    if args.config is not None:
        tokens, fields = _read_yaml(args.config, parser)
        args, rest = parser.parse_known_args([*tokens, *argv])
    fields |= assignments(rest)
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"--set takes FIELD=VALUE, got {text!r}")
        fields[name.strip().replace("-", "_")] = value.strip()
    return args, fields


def _read_yaml(path: str, parser: argparse.ArgumentParser) -> tuple[list[str], dict[str, Any]]:
    """A YAML file as (options as on the command line, fields)."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"--config {path}: a mapping of options and fields is needed, got {type(content).__name__}")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    if "config" in content:
        raise OptionError(f"--config {path}: a file cannot name another one ('config')")
    fields = content.pop("set", None) or {}
    options = {action.dest: action for action in parser._actions if action.option_strings}
    tokens: list[str] = []
    for name, value in content.items():
        if name not in options:
            fields[name] = value
        elif options[name].nargs == 0:  # a flag, with its opposite behind it if it has one
            tokens += options[name].option_strings[:1] if value else options[name].option_strings[1:]
        elif value is not None:
            tokens += [options[name].option_strings[0], *map(str, value if isinstance(value, list) else [value])]
    return tokens, fields


def write_settings(path: Path, args: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Writes the settings of a run as a file for `--config`."""
    leave_out = {"command", "traceback", "config", "set", "fields", "resume", "overwrite", "output"}
    settings = {name: value for name, value in vars(args).items() if name not in leave_out and value is not None}
    path.write_text(yaml.safe_dump({**settings, "set": fields}, sort_keys=False), encoding="utf-8")
