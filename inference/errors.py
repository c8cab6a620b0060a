# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Errors that are the user's to mend: printed in one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UserError", "user_errors"]


class UserError(Exception):
    """Bad input to a program; the message says what was expected, what was found, what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a :class:`UserError` into ``error: ...`` on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
