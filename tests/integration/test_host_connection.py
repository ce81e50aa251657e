# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A control's commands on a host: over Ansible's own SSH connection, with standard input, time after time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.playbook.play_context import PlayContext
from ansible.playbook.task import Task
from ansible.plugins.loader import connection_loader

from ansible_collections.firebreak.incident.plugins.action.secret_delivery import ActionModule
from ansible_collections.firebreak.incident.plugins.plugin_utils.control import HostConnection
from lab.client import Lab

MULTIPLEXED = "-o ControlMaster=auto -o ControlPersist=20s"
ALONE = "-o ControlMaster=no -o ControlPath=none"
TIMES = 20

Connect = Callable[[str], HostConnection]


@pytest.fixture
def connect(lab: Lab) -> Iterator[Connect]:
    opened = []
    # A socket's path may have some 100 characters only: not in pytest's folder.
    with tempfile.TemporaryDirectory() as sockets:

        def connection_with(ssh_args: str) -> HostConnection:
            context = PlayContext()
            connection = connection_loader.get("ssh", context)
            context.executable = ""  # no shell around the command's own, which would keep the outputs open
            variables = {"ansible_ssh_args": ssh_args, "ansible_control_path_dir": sockets}
            connection.set_options(var_options=lab.hostvars("app") | variables)
            opened.append(connection)
            host = HostConnection(ActionModule(Task(), connection, context, DataLoader(), None, None))
            assert host.run("true", b"the first only opens what the others share\n")[0] == 0
            return host

        yield connection_with
        for connection in opened:
            connection.reset()


@pytest.mark.parametrize("ssh_args", [MULTIPLEXED, ALONE], ids=["multiplexed", "alone"])
def test_input_outputs_and_status_arrive_every_time(connect: Connect, ssh_args: str) -> None:
    host = connect(ssh_args)
    given = b"NAME=value\n=\n"
    seen = [host.run("cat; echo told >&2; exit 3", given) for _unused in range(TIMES)]
    assert [(status, output) for status, output, _errors in seen] == [(3, given)] * TIMES
    assert all(b"told\n" in errors for _status, _output, errors in seen)


@pytest.mark.parametrize("ssh_args", [MULTIPLEXED, ALONE], ids=["multiplexed", "alone"])
def test_status_arrives_long_after_the_end_of_the_outputs(connect: Connect, ssh_args: str) -> None:
    host = connect(ssh_args)
    status, output, _errors = host.run("cat; exec >&- 2>&-; sleep 0.2; exit 3", b"any\n")
    assert (status, output) == (3, b"any\n")


@pytest.mark.parametrize("ssh_args", [MULTIPLEXED, ALONE], ids=["multiplexed", "alone"])
def test_output_that_follows_the_end_of_the_other_arrives(connect: Connect, ssh_args: str) -> None:
    host = connect(ssh_args)
    late = "read line; exec {}>&-; sleep 0.2; echo late >&{}; exit 4"
    status, output, _errors = host.run(late.format(2, 1), b"any\n")
    assert (status, output) == (4, b"late\n")
    status, _output, errors = host.run(late.format(1, 2), b"any\n")
    assert status == 4 and b"late\n" in errors


def test_input_larger_than_a_pipe_arrives_whole(connect: Connect) -> None:
    host = connect(MULTIPLEXED)
    status, output, _errors = host.run("sleep 0.2; wc -c", b"x" * 300_000)
    assert (status, output.strip()) == (0, b"300000")
