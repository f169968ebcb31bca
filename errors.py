# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend."""


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected, and what to do.

    The command line prints the message alone, without a traceback, and exits with 1.
    """


class UnfinishableError(UserError):
    """Bad input that the same command would meet again: what is mended makes another output.

    What is finished of the output is of no use then, and is removed with the rest (`jai.files.resumable_folder`).
    """
