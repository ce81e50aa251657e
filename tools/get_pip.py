# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Install pip from the wheel that comes with Python, called as ansible-test calls its own script for it."""

from __future__ import annotations

import ensurepip
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

# Distributions keep the wheel in a folder of their own.
places = [
    Path(ensurepip.__file__).parent / "_bundled",
    Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or "/usr/share/python-wheels"),
]
wheel = next(wheel for place in places for wheel in place.glob("pip-*.whl"))
arguments = [argument for argument in sys.argv[1:] if argument not in ("--no-setuptools", "--no-wheel")]
environment = {**os.environ, "PYTHONPATH": str(wheel)}  # a wheel is importable as it stands
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", *arguments], env=environment))
