"""Errors whose message is meant for the user: one sentence that names what is wrong and what would be right.

Every class derives from `UserError` and from the built-in error of its kind, so that callers may catch either. The
command line prints the sentence of a `UserError` without a traceback and lets every other exception through.
"""

from __future__ import annotations


class UserError(Exception):
    """The base of all errors that are meant for the user.

    Example:
        >>> from labn import explain
        >>> import torch
        >>> try:
        ...     explain(torch.nn.Identity(), torch.zeros(1, 3, 8, 8), "gradcm")
        ... except UserError as error:
        ...     print(error)
        There is no method 'gradcm'; did you mean gradcam, xgradcam, gradcam++?
    """

    exit_status = 2
    """Status with which a command without a trainer ends."""


class InputError(UserError, ValueError):
    """An argument, a field of a configuration or the content of a file has a wrong value."""


class InputTypeError(UserError, TypeError):
    """An argument has a wrong type, or a function or setting does not take it."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder does not exist."""


class FileError(UserError, OSError):
    """A file cannot be read or written; the first argument may be the error number of the system."""


class UnsupportedError(UserError, NotImplementedError):
    """A network has an operation that the chosen method has no rule for."""


class LostProcessError(UserError, ConnectionError):
    """Another process of the same run has ended."""


class FailedProcessError(UserError, ChildProcessError):
    """A command that was started as a process of its own has failed."""


def sentence_of(error: BaseException) -> str | None:
    """The message of the first `UserError` among `error` and its causes; None where there is none."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, UserError):
            return str(link)
        link = link.__cause__
    return None
