# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The users of the victim application, and how a password is kept: the seed and the application share it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

ITERATIONS = 1000  # cheap on purpose: 200 users are made at each start


def hash_password(password: str, salt: bytes | None = None, iterations: int = ITERATIONS) -> str:
    salt = salt or secrets.token_bytes(16)
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    return f"pbkdf2_sha256${iterations}${salt.hex()}${digest.hex()}"


def check_password(password: str, stored: str) -> bool:
    _unused, iterations, salt, _unused = stored.split("$")
    return hmac.compare_digest(hash_password(password, bytes.fromhex(salt), int(iterations)), stored)


def make(count: int) -> list[dict[str, Any]]:
    people = []
    for number in range(1, count + 1):
        password = secrets.token_urlsafe(9)
        people.append(
            {
                "id": number,
                "email": f"user{number:03d}@example.com",
                "password": password,
                "password_hash": hash_password(password),
            }
        )
    return people
