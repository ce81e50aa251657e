# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Products with one mistake each, and the part of the harness that must turn red for it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file``; with ``new`` in its place the tests ``by`` fail."""

    name: str
    file: str
    old: str
    new: str
    by: tuple[str, ...]


ACTION = "plugins/module_utils/_action.py"
DECISION = "plugins/module_utils/_decision.py"
ENGINE = "plugins/module_utils/_engine.py"
PLAN = "plugins/module_utils/_plan.py"
TASK = "plugins/module_utils/_task.py"
CASE = "plugins/module_utils/_case.py"
STORE = "plugins/module_utils/_store.py"
RELEASE = "plugins/module_utils/_release.py"
GUARDS = "plugins/module_utils/_guards.py"
CLOUDFLARE = "plugins/module_utils/_cloudflare.py"
REDACT = "plugins/module_utils/_redact.py"

MUTANTS = [
    Mutant(
        "skip the verify",
        ACTION,
        "            outcome = self._verify(plan)\n",
        '            outcome = "verified"\n',
        ("tests/unit/test_engine.py::test_what_is_lost_in_a_write_is_noticed",),
    ),
    Mutant(
        "journal after the write",
        ACTION,
        "                of = self._intent(journal, plan, overridden)\n                break\n",
        "                for change in plan.changes:\n"
        "                    self.task.control.apply(self.client, self.task.params, change)\n"
        "                of = self._intent(journal, plan, overridden)\n                break\n",
        ("tests/truth/test_kill.py::test_killed_then_run_again[postgresql_login_lock]",),
    ),
    Mutant(
        "write after a takeover",
        ACTION,
        "                if journal.taken_over():\n                    return\n",
        "                journal.taken_over()\n",
        ("tests/truth/test_kill_orphans.py",),
    ),
    Mutant(
        "undo from the after-image",
        PLAN,
        '        "before": at(plan.before, change.path),\n',
        '        "before": at(plan.after, change.path),\n',
        ("tests/truth/test_kill.py::test_release_killed_then_run_again[postgresql_login_lock]",),
    ),
    Mutant(
        "mark before the effect",
        "plugins/modules/postgresql_write_fence.py",
        'changes.append(Change(action, f"mark',
        'changes.insert(0, Change(action, f"mark',
        ("tests/truth/test_kill.py::test_killed_then_run_again[postgresql_write_fence]",),
    ),
    Mutant(
        "read the wrong stream",
        CASE,
        "        return self._record(Stream(self, stream_name), kind, body)\n",
        "        return self._record(Stream(self, RUN), kind, body)\n",
        ("tests/truth/test_kill.py::test_release_killed_then_run_again[postgresql_login_lock]",),
    ),
    Mutant(
        "censor only the front",
        REDACT,
        "            text = text.replace(value, HIDDEN)\n",
        "            text = HIDDEN + text[len(value) :] if text.startswith(value) else text\n",
        ("tests/truth/test_silence.py::test_a_leaking_control_is_caught[Base64 in a message]",),
    ),
    Mutant(
        "drop a guard: what is protected",
        DECISION,
        "    _guards.protected(plan, ",
        "    (plan, ",
        ("tests/truth/test_guards.py::test_each_guard_refuses_and_yields_only_to_a_record[postgresql_login_lock]",),
    ),
    Mutant(
        "drop a guard: a HALT in a dry run",
        ENGINE,
        "            halted()\n            plan = decide",
        "            plan = decide",
        ("tests/truth/test_guards.py::test_each_guard_refuses_and_yields_only_to_a_record[cloudflare_waf_rule]",),
    ),
    Mutant(
        "drop a guard: who approves is somebody else",
        DECISION,
        ' and entry.doc["actor"] != task.context.actor',
        "",
        ("tests/truth/test_guards.py::test_each_guard_refuses_and_yields_only_to_a_record[secret_delivery]",),
    ),
    Mutant(
        "let the environment into the lab",
        TASK,
        "        context.env = {}\n",
        "        pass\n",
        ("tests/truth/test_guards.py::test_each_guard_refuses_and_yields_only_to_a_record[postgresql_write_fence]",),
    ),
    Mutant(
        "block through a spelling of IPv6",
        GUARDS,
        '    (ipaddress.IPv6Network("2002::/16"), 16),\n',
        "",
        ("tests/truth/test_guards.py::test_what_is_blocked_covers_nobody_protected[cloudflare_ip_list]",),
    ),
    Mutant(
        "call an unclear answer a clear no",
        CLOUDFLARE,
        'raise CloudflareError(msg, 0, (), "none" if never else "unknown") from None',
        'raise CloudflareError(msg, 0, (), "none") from None',
        ("tests/truth/test_faults.py::test_a_service_goes_wrong[cloudflare_waf_rule]",),
    ),
    Mutant(
        "swallow a timeout",
        ACTION,
        "            raise\n        finally:\n            task.context.changing = False\n",
        "        finally:\n            task.context.changing = False\n",
        ("tests/truth/test_faults.py::test_a_service_goes_wrong[cloudflare_waf_rule]",),
    ),
    Mutant(
        "repeat what may have had its effect",
        CLOUDFLARE,
        "                if error.status != 429:\n",
        "                if error.status not in (429, 500):\n",
        ("tests/truth/test_faults.py::test_a_service_goes_wrong[cloudflare_waf_rule]",),
    ),
    Mutant(
        "no read-back after 412",
        STORE,
        "        return self._put_new(key, lambda: data) or self.get(key) == data\n",
        "        return self._put_new(key, lambda: data)\n",
        ("tests/truth/test_faults_store.py::test_a_store_in_trouble_and_back[postgresql_login_lock-s3]",),
    ),
    Mutant(
        "claim what is claimed",
        CASE,
        '        return max(0.0, float(self.head.body.get("until", 0)) - self.case.store.now())\n',
        "        return 0.0\n",
        (
            "tests/truth/test_faults_store.py::"
            "test_a_live_run_of_a_machine_with_another_clock_is_waited_for[postgresql_write_fence-s3]",
        ),
    ),
    Mutant(
        "replace the whole list",
        CLOUDFLARE,
        '            self._bulk("post", list_id, "add entries',
        '            self._bulk("put", list_id, "add entries',
        ("tests/truth/test_ownership.py::test_edits_between_any_two_requests_stay[cloudflare_ip_list]",),
    ),
    Mutant(
        "write the whole secret",
        "plugins/module_utils/_vault.py",
        'self._write("patch", mount, path, values, cas)',
        'self._write("post", mount, path, values, cas)',
        ("tests/truth/test_ownership.py::test_edits_between_any_two_requests_stay[vault_kv_rotation]",),
    ),
    Mutant(
        "undo what somebody else changed",
        RELEASE,
        '            if conflicts and not self.params["force"]:\n',
        '            if conflicts and self.params["force"]:\n',
        ("tests/truth/test_undo.py::test_somebody_elses_change_is_reported_and_kept[cloudflare_waf_rule softened]",),
    ),
    Mutant(
        "write in a dry run",
        ENGINE,
        "        if context.check_mode:\n            halted",
        "        if context.check_mode and control.dry_run:\n            halted",
        ("tests/truth/test_dry_run.py::test_a_dry_run_tells_what_the_real_run_does[postgresql_login_lock]",),
    ),
    Mutant(
        "believe a seal",
        "plugins/module_utils/_verify.py",
        "            self._seal(entry)\n",
        "            pass\n",
        ("tests/truth/test_journal.py::test_the_first_bad_entry_is_named[the tail cut]",),
    ),
    Mutant(
        "believe a digest",
        "plugins/module_utils/_verify.py",
        '    return digest if data.startswith(digest.encode(), here - 64) else ""\n',
        "    return data[here - 64 : here].decode()\n",
        ("tests/truth/test_journal.py::test_a_flipped_bit_is_named",),
    ),
    Mutant(
        "two may write the same entry of a folder",
        STORE,
        "                except FileExistsError:\n                    return target.read_bytes() == data\n",
        "                except FileExistsError:\n                    return True\n",
        ("tests/unit/test_engine.py::test_twenty_at_once_open_one_incident",),
    ),
    Mutant(
        "two may write the same entry in S3",
        STORE,
        "        return self._put_new(key, lambda: data) or self.get(key) == data\n",
        "        return self._put_new(key, lambda: data) or True\n",
        ("tests/truth/test_once.py::test_one_of_many_mutates[postgresql_login_lock-s3]",),
    ),
    Mutant(
        "show a task's options to callbacks",
        "plugins/plugin_utils/control.py",
        "        self._task.args = known.censor(shown_options(self.control, self._given))\n",
        "        shown_options(self.control, self._given)\n",
        ("tests/truth/test_silence.py::test_no_secret_is_shown[redis_session_revocation]",),
    ),
    Mutant(
        "let a library's log out",
        REDACT,
        "            logging.disable(logging.CRITICAL)\n",
        "            pass\n",
        ("tests/truth/test_silence.py::test_what_a_server_says_is_not_shown[cloudflare_waf_rule]",),
    ),
]
