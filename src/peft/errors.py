"""What this library raises and warns with, beyond Python's own exceptions."""


class PeftError(Exception):
    """Base of the errors that only this library knows."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A configuration targets modules or parameters that the model does not have."""


class AdapterFileError(PeftError, ValueError):
    """A file of an adapter is damaged, or says what a file may not say; the message names the file."""


class NoAdapterError(PeftError, ValueError):
    """Where an adapter was looked for, there is none."""


class UnknownMethodError(PeftError, KeyError):
    """A method (`peft_type`) that this version does not know."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class PeftWarning(UserWarning):
    """Something was asked for that has no effect, or an effect worth knowing about."""


class PeftRuntimeWarning(PeftWarning, RuntimeWarning):
    """Settings that match nothing in a model. A RuntimeWarning too, since that is the class that callers filter by."""
