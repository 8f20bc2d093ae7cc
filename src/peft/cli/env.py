"""`peft env`: what is installed here, for a report of a fault."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from peft.cli.options import TABLES


def run(*_: Any) -> None:
    import torch

    print(f"{'python':<16} {platform.python_version()} on {platform.platform()}")
    for name in TABLES.packages:
        try:
            print(f"{name:<16} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<16} not installed")
    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{'GPUs':<16} {', '.join(found) or 'none'}{f' (CUDA {torch.version.cuda})' if found else ''}")
    print(f"{'CPU':<16} {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
