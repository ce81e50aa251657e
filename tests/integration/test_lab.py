# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab keeps its promises: real servers with their data, doors that close, and no process left behind."""

from __future__ import annotations

from lab.client import Lab


def test_first_login_within_three_seconds(lab: Lab) -> None:
    assert 0 < lab.state["first_login_after"] <= 3
