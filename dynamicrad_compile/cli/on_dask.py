"""`--dask ADDRESS`, of the commands whose work may be done on other machines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import OptionsError
from ..optional import optional

PATIENCE = 10
"""Seconds in which a scheduler must answer."""


def add_dask(parser: argparse.ArgumentParser) -> None:
    """Add the argument to a command's parser."""
    parser.add_argument(
        "--dask", metavar="ADDRESS", help="do it on the workers of Dask's scheduler there, such as tcp://host:8786"
    )


@contextmanager
def dask_executor(address: str | None) -> Iterator[Any]:
    """A client of the scheduler, which is an executor; None without an address.

    Raises OptionsError where no scheduler answers, and DynamicRadError without dask.distributed.
    """
    if address is None:
        yield None
        return
    distributed = optional("distributed", "--dask needs", "dask")
    try:
        client = distributed.Client(address, timeout=PATIENCE)
    except (OSError, distributed.TimeoutError, ValueError) as error:
        raise OptionsError(
            f"--dask: no scheduler at {address}: {error}. Start one with `dask scheduler`, which says its address, and "
            "workers with `dask worker ADDRESS`."
        ) from None
    with client:
        yield client
