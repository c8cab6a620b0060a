# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Errors that are the user's to mend: printed in one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "UserError",
    "check_device",
    "check_options",
    "check_unread",
    "failed",
    "needs",
    "one_seed",
    "positive",
    "some_seeds",
    "user_errors",
]


class UserError(Exception):
    """Bad input to a program; the message says what was expected, what was found, what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a :class:`UserError` into ``error: ...`` on stderr and exit status 2, and Ctrl-C into
    one line and 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; what was written is whole", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def needs(what: str, package: str, extra: str) -> Iterator[None]:
    """Where a package is missing, says what needs it, and what to install.

    :raises UserError: for a ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what}: expected {package} to be installed, found: {error}; "
            f'pip install "pyro-ardae[{extra}]"'
        ) from None


def check_options(options: Any, conditions: Iterable[tuple[bool, str, str]]) -> None:
    """Refuses options out of range.

    :param options: a dataclass of options.
    :param conditions: of each whether it holds, the option's name, and what is expected.
    :raises UserError: naming the first that does not hold.
    """
    for holds, option, expected in conditions:
        if not holds:
            found = getattr(options, option.replace("-", "_"))
            raise UserError(f"--{option}: expected {expected}, found {found}")


def positive(options: Any, *names: str) -> list[tuple[bool, str, str]]:
    """Conditions for :func:`check_options`: these options are above 0, or left out (None)."""
    found = {name: getattr(options, name) for name in names}
    return [
        (value is None or value > 0, name.replace("_", "-"), "a positive number")
        for name, value in found.items()
    ]


def one_seed(options: Any) -> list[tuple[bool, str, str]]:
    """A condition for :func:`check_options`: ``seed`` is one that every generator takes."""
    return [(_is_seed(options.seed), "seed", "a number in [0, 2^32)")]


def some_seeds(options: Any) -> list[tuple[bool, str, str]]:
    """The same of ``seeds``, of which there are some."""
    holds = bool(options.seeds) and all(map(_is_seed, options.seeds))
    return [(holds, "seeds", "one at least, each in [0, 2^32)")]


def _is_seed(number: int) -> bool:
    return 0 <= number < 2**32


def failed(run: str, error: ValueError, advice: str) -> UserError:
    """What a run ends in that has diverged."""
    return UserError(f"{run}: the run failed: {str(error).rstrip('.')}. {advice}")


def check_unread(options: Any, defaults: Any, names: Iterable[str], *, reader: str) -> None:
    """Refuses options that would be ignored.

    :param options: a dataclass of options.
    :param defaults: one whose values count as not given.
    :param names: the options that are not read.
    :param str reader: what does not read them.
    :raises UserError: for the first that is not left at its default.
    """
    for name in names:
        if getattr(options, name) != getattr(defaults, name):
            raise UserError(
                f"--{name.replace('_', '-')}: {reader} does not read it, expected it to be left "
                f"out, found {getattr(options, name)!r}"
            )


def check_device(device: str) -> None:
    """Refuses a device that torch cannot use here.

    :raises UserError: saying why.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--device: expected one that torch can use here, such as cpu, found {device}: {reason}"
        ) from None
