"""The `peft` command: train, tune, estimate, generate, merge, extract, resize, convert, inspect, demo, env.

Each command is a module of its name with a `run`, imported when it is called, so that `peft --help` answers without
torch or transformers. The room uses the library by its public names, as a user's script would; the training loop is
that of transformers, what belongs to adapters is here.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from peft.cli.options import COMMANDS, TABLES
from peft.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """The console entry point.

    Args:
        argv: arguments of the command line, without the program's name; those of the process if None.

    Returns:
        0; 1 where a command failed; 2 where its options cannot be read or do not fit; 130 where it was interrupted.
    """
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how the line may go on
        from peft.cli.parse import complete

        complete(os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])])
    argv = list(sys.argv[1:] if argv is None else argv)
    command, *rest = [token for token in argv if token != "--traceback"] or ["help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    if command in ("-h", "--help", "help", "--version"):
        print(f"peft {__version__}" if command == "--version" else _overview())
        return 0
    # Read when torch is loaded: waiting threads that spin make small models up to ten times slower on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress is said in a way of its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch")
    for name in TABLES.noisy:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return _call(command, rest)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--traceback" in argv:
            raise
        return _report(command, error)


def _overview() -> str:
    lines = [f"  {name:<10} {(options.__doc__ or '').splitlines()[0]}" for name, options in COMMANDS.items()]
    head = ["usage: peft COMMAND [OPTION ...]", "", "Parameter-efficient fine-tuning.", "", "commands:", *lines, ""]
    return "\n".join([*head, "`peft COMMAND --help` lists the options; --traceback shows where an error comes from."])


def _call(command: str, argv: Sequence[str]) -> int:
    from peft.cli.parse import OptionError, help_of, nearest, read

    if command not in COMMANDS:
        other = TABLES.commands.get(command)
        hint = f"; it is {other!r} here." if other else nearest(command, COMMANDS) or "."
        raise OptionError(f"there is no such command{hint} There are {', '.join(COMMANDS)}")
    needed = ["jsonargparse", *COMMANDS[command].needs.split()]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(f"this needs {' and '.join(missing)}, which is not installed here: pip install 'peft[cli]'")
    text = help_of(command, argv)
    if text:
        print(text)
        return 0
    options, fields, trainer = read(command, argv)
    processes = getattr(options, "num_processes", 1)
    if processes > 1 and "RANK" not in os.environ:
        return _launch(processes, argv)
    return import_module(f"peft.cli.{command}").run(options, fields, trainer) or 0


def _launch(processes: int, argv: Sequence[str]) -> int:
    """`peft train` in several processes of this machine, as torchrun starts them."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(["--standalone", f"--nproc-per-node={processes}", "-m", "--", "peft", "train", *argv])
    except ChildFailedError:
        return 1  # it has said why
    return 0


def _report(command: str, error: Exception) -> int:
    """Says what went wrong; returns the exit code."""
    from peft.cli.parse import OptionError

    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = str(message).strip() or f"{type(error).__name__} (--traceback shows where)"
    if isinstance(error, ModuleNotFoundError):
        text += f": pip install {error.name}"
    if int(os.environ.get("RANK", 0)) > 0:  # the first process says it, before torchrun ends all when one ends
        time.sleep(5)
    print(f"peft {command}: error: {text}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, OptionError) else 1
