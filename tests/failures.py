"""Errors and interrupts at any line of the library."""

import os
import sys
from collections.abc import Callable

import torch

import peft

#: where the lines are that may fail
_LIBRARY = os.path.dirname(os.path.abspath(peft.__file__))


class Failure:
    """Raises an error at the n-th line of the library that runs."""

    def __init__(self, n: int, error: type[BaseException]):
        self.left, self.error = n, error

    def __call__(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(_LIBRARY) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise self.error("injected")
        return self.line


def fails(call: Callable[[], object], n: int, error: type[BaseException]) -> bool:
    """Runs a call with a failure at its n-th line; whether it came to that."""
    before, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(Failure(n, error))
    try:
        call()
    except error as raised:
        if "injected" not in str(raised):
            raise
        return True
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(grad)  # Python may be on the way out of no_grad(), past its last line
    return False
