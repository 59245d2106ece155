"""A pool of processes."""

import os

import pytest

from lgp.compute.processes import pool
from lgp.errors import LgpError


def test_killed_process_promises_nothing_that_the_caller_may_not_do() -> None:
    with pytest.raises(LgpError, match=r"run again; `lgp prepare` goes on where it was$"), pool(1) as processes:
        processes.submit(os._exit, 3).result()
