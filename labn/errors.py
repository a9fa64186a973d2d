"""Errors whose message is meant for the user: one sentence that names what is wrong and what would be right.

Every class derives from `UserError` and from the built-in error of its kind, so that callers may catch either. The
command line prints the sentence of a `UserError` without a traceback and lets every other exception through.
"""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that change the direction or the line of a text, and bytes that are not UTF-8."""


def printable(text: str, keep: str = "") -> str:
    """A text for the terminal: characters that would control it, as a stranger's file name may have, are escaped.

    Args:
        text: the text.
        keep: control characters that stay, such as the line breaks of a table.

    Example:
        >>> print(printable("a\\x1b[2Jb.png"))
        a\\x1b[2Jb.png
    """
    return _UNPRINTABLE.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


def without_credentials(text: str) -> str:
    """A text whose URIs have lost their user part, which may hold a password or a token.

    Example:
        >>> without_credentials("run 1 in https://me:secret@host:5000/api")
        'run 1 in https://host:5000/api'
    """
    # The user part ends at the last @ before the path (RFC 3986, section 3.2), as in `urllib.parse.urlsplit`.
    return re.sub(r"(?<=://)[^/?#\s\"']*@", "", text)


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

    def __str__(self) -> str:
        """The sentence, in which names with control characters are escaped."""
        return printable(super().__str__())


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
