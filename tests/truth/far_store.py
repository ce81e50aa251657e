# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's S3 store, whose time a test can let pass: a claim that a dead run left is over at once, not after its deadline."""

from __future__ import annotations

import datetime
import mmap
import re
import struct
import time
from typing import Any
from urllib.parse import urlsplit

from lab.client import Lab
from lab.tcp_proxy import Connection, TcpProxy

BUCKET = "cases"
LONGEST_CLAIM = 150.0  # of any control, and a little more
DATE = re.compile(rb"(?i)(\r\ndate: )([A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT)(\r\n)")
FORM = "%a, %d %b %Y %H:%M:%S GMT"


class FarStore:
    """A proxy before S3 that turns the clock of its answers forward; use as a context manager."""

    def __init__(self, lab: Lab, prefix: str) -> None:
        where = urlsplit(lab.env["AWS_ENDPOINT_URL_S3"])
        self._ahead = mmap.mmap(-1, 8)  # shared with runs in forks of this process
        self._proxy = TcpProxy((str(where.hostname), int(where.port or 80)), tap=self._tap)
        self.uri = (
            f"s3://{BUCKET}/{prefix}?endpoint=http://127.0.0.1:{self._proxy.port}&lock_mode=GOVERNANCE&retention_days=1"
        )
        self.options = {
            "case_store": self.uri,
            "case_access_key_id": lab.env["AWS_ACCESS_KEY_ID"],
            "case_secret_access_key": lab.env["AWS_SECRET_ACCESS_KEY"],
        }

    def __enter__(self) -> FarStore:
        return self

    def __exit__(self, *_unused: object) -> None:
        self._proxy.close()

    @property
    def ahead(self) -> float:
        return float(struct.unpack("d", self._ahead[:])[0])

    def clock(self) -> float:
        """The same time for a run's own clock."""
        return time.time() + self.ahead

    def passes(self, seconds: float = LONGEST_CLAIM) -> None:
        self._ahead[:] = struct.pack("d", self.ahead + seconds)

    def _tap(self, _line: Connection, way: str, data: bytes) -> bytes:
        return DATE.sub(self._later, data) if way == "down" else data

    def _later(self, found: Any) -> bytes:
        told = datetime.datetime.strptime(found[2].decode(), FORM).replace(tzinfo=datetime.UTC)
        later = (told + datetime.timedelta(seconds=self.ahead)).strftime(FORM)
        return bytes(found[1]) + later.encode() + bytes(found[3])
