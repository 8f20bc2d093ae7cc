"""The version, as the installed distribution states it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("peft")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.22.0"
