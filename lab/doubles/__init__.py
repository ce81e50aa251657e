# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Doubles of services that nobody can start on a laptop: stateful, strict, and able to fail on request."""
