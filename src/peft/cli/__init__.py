"""The `peft` command: train, generate, merge, extract, convert, inspect, demo.

Each command is a module of its name with a `run`, imported when it is called, so that `peft --help` answers without
torch or transformers. The room uses the library by its public names, as a user's script would.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from peft.cli.arguments import COMMANDS, add_arguments, option_names, read_train
from peft.cli.fields import OptionError, describe, nearest
from peft.errors import PeftError
from peft.registry import method_of
from peft.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """The console entry point.

    Args:
        argv: arguments of the command line, without the program's name; those of the process if None.

    Returns:
        0; 1 where a command failed; 2 where its options cannot be read; 130 where it was interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    root = argparse.ArgumentParser(prog="peft", description="Parameter-efficient fine-tuning.", allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"peft {__version__}")
    root.add_argument("--traceback", action="store_true", help="on an error, show where it comes from")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers = {name: add_arguments(name, commands.add_parser(name, help=row[0])) for name, row in COMMANDS.items()}
    args, rest = root.parse_known_args(argv)
    if args.command is None:
        root.print_help()
        return 0
    # Read when torch is loaded: waiting threads that spin make small models up to ten times slower on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = parsers[args.command]
    try:
        if args.command == "train":
            options, fields = read_train(argv[argv.index("train") + 1 :], parser)
            if options.fields:
                print(describe(method_of(options.method.upper()).config_class))
                return 0
            _require("train")
            return import_module("peft.cli.train").run(options, fields)
        _require(args.command)
        if rest:
            raise OptionError(f"unknown option {rest[0]!r}{nearest(rest[0], option_names(parser))}")
        return import_module(f"peft.cli.{args.command}").run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (PeftError, ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
        if args.traceback:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"peft {args.command}: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1


def _require(command: str) -> None:
    missing = [name for name in COMMANDS[command][2] if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"`peft {command}` needs {' and '.join(missing)}, which is not installed here: pip install 'peft[cli]'"
        )
