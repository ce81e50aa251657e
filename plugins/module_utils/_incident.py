# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""The incident itself: opened once, and folded from its entries."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from ._case import RUN, UNREADABLE, Case, Entry, Moved, Stream, canonical
from ._control import Context
from ._errors import Refused, StoreUnavailable
from ._store import Store

IDLE_HOURS = 12
EXPIRES_DAYS = 7
# Severity by type: the strictest that any of the response plans names.
TYPES = {
    "data_breach": "SEV-1",
    "credential_compromise": "SEV-1",
    "unauthorized_access": "SEV-1",
    "ddos": "SEV-1",
    "service_outage": "SEV-1",
    "database_failure": "SEV-1",
    "data_corruption": "SEV-1",
    "payment_failure": "SEV-1",
    "api_abuse": "SEV-2",
    "performance_degradation": "SEV-2",
    "high_error_rate": "SEV-2",
    "third_party_failure": "SEV-2",
}
CROSSWALK = {"SEV-1": ("P0", "PAGE"), "SEV-2": ("P1", "TICKET"), "SEV-3": ("P2", "INFO"), "SEV-4": ("P3", "INFO")}
# Seconds within which a phase of an incident playbook should be over.
TARGETS = {"identify": 60, "fence": 30, "preserve": 120, "contain": 60, "verify": 60, "communicate": 900}
PHASES = tuple(TARGETS)


def severity_of(text: str | None, kind: str) -> str:
    """One of four severities, whichever of its three names was given."""
    if text is None:
        return TYPES[kind]
    for name, (priority, alert) in CROSSWALK.items():
        if text in (name, priority) or (text == alert and alert != "INFO"):
            return name
    if text == "INFO":
        return "SEV-3"
    raise Refused(f"severity: {text} is none of SEV-1 to SEV-4, P0 to P3, PAGE, TICKET, INFO")


def key_of(params: dict[str, Any]) -> str:
    """Alerts about the same thing continue the same incident."""
    named = params.get("key")
    parts = ["key", named] if named else [params["type"], params.get("site"), sorted(params.get("affected") or [])]
    return hashlib.sha256(canonical(parts)).hexdigest()


def entries_of(case: Case, stream: str) -> list[Entry]:
    return case.fetch([(stream, seq) for seq in case.numbers(stream)])


def fold(entries: Iterable[Entry]) -> dict[str, Any]:
    """What the incident is, from the entries of the run's own stream."""
    state: dict[str, Any] = {}
    for entry in entries:
        body = entry.body
        if entry.kind == "opened":
            state = {
                **body,
                "status": "Active",
                "created": entry.doc["time"],
                "rounds": {"1": body["at"]},
                "seals": [],
            }
        elif entry.kind == "closed":
            state["status"] = "Resolved"
            state["closed"] = True
        if entry.kind == "seal":
            state["seals"].append({"turn": body["turn"], "digest": entry.digest, "heads": body["heads"]})
        state.update(body.get("set") or {})
        if "begins_round" in body:
            state["rounds"].setdefault(str(body["begins_round"]), body["at"])
        state["last"] = entry.doc["time"]
    return state


def state_of(case: Case, run: list[Entry] | None = None) -> dict[str, Any]:
    """What the incident is; ``run`` are the entries of its own stream, where they were read already."""
    state = fold(entries_of(case, RUN) if run is None else run)
    if not state:
        raise Refused(f"incident_id: {case.id} is not in this case store; check firebreak_incident_id and case_store")
    if state["site"] != case.params.get("site"):
        ours = case.params.get("site")
        raise Refused(f"site: {case.id} is of the site {state['site']}, and this run is of {ours}", guard="site")
    return state


def find_or_open(store: Store, params: dict[str, Any], context: Context) -> tuple[Case, bool]:
    """The incident of this key, and whether it was opened here.

    A claim ``keys/<key>/<n>`` names an id before anything stands under that id, and whoever comes next finishes what a
    killed run began. So of many runs at once one opens, all continue the same one, and no number is lost.
    """
    key = key_of(params)
    for _attempt in range(200):
        claims = store.names(f"keys/{key}")
        newest = int(claims[-1]) if claims else 0
        try:
            case = _claimed(store, key, newest, params, context) if newest else None
            head = _head(case) if case is not None else None
            closed = case is not None and head is not None and bool(state_of(case).get("closed"))
        except StoreUnavailable as failure:
            if not params.get("new"):
                raise StoreUnavailable(
                    f"{failure.msg}, or open another incident (firebreak_incident_new=true)"
                ) from None
            case = head = None
        if case is not None and head is None and not context.check_mode:
            opened = _write_opened(case, key, params, context)
            if opened is not None:
                return case, opened
            continue
        # The number that a claim names may have gone to another key.
        ours = case is not None and head is not None and head.body.get("key") == key
        if case and head and ours and not closed and (not params.get("new") or head.run == context.run_id):
            return case, False
        if context.check_mode:
            raise LookupError
        identity = next_id(store)
        if not store.create(f"keys/{key}/{newest + 1:06d}", canonical({"id": identity, "run": context.run_id})):
            continue
    raise StoreUnavailable("case_store: too many runs open incidents at once; run the same command again")


def _claimed(store: Store, key: str, number: int, params: dict[str, Any], context: Context) -> Case | None:
    """The incident that a claim names."""
    data = store.get(f"keys/{key}/{number:06d}")
    try:
        return None if data is None else Case(store, str(json.loads(data)["id"]), params, context)
    except UNREADABLE:
        raise StoreUnavailable(
            f"case_store: keys/{key}/{number:06d} is not readable; name the incident (firebreak_incident_id)"
        ) from None


def _head(case: Case) -> Entry | None:
    """The entry that opened the incident."""
    if case.store.get(f"{case.id}/journal/{RUN}/00000001.json") is None:
        return None
    return Stream(case, RUN).entry(1)


def next_id(store: Store) -> str:
    """INC-YYYY-MMDD-NNN, by the store's date (UTC)."""
    day = datetime.datetime.fromtimestamp(store.now(), datetime.UTC).strftime("INC-%Y-%m%d-")
    taken = [int(name[len(day) :]) for name in store.names("") if re.fullmatch(re.escape(day) + r"\d{3,}", name)]
    return f"{day}{max(taken, default=0) + 1:03d}"


def _write_opened(case: Case, key: str, params: dict[str, Any], context: Context) -> bool | None:
    """True: opened here. False: somebody else did, for this key. None: the number went to another key."""
    now = case.store.at_latest()  # what is revoked began before it: by the clock of the store, where it has one
    expires = datetime.datetime.fromtimestamp(now, datetime.UTC) + datetime.timedelta(days=EXPIRES_DAYS)
    severity = severity_of(params.get("severity"), params["type"])
    body = {
        "type": params["type"],
        "title": params.get("title") or params["type"].replace("_", " ").capitalize(),
        "severity": severity,
        "priority": CROSSWALK[severity][0],
        "alert": CROSSWALK[severity][1],
        "impact": sorted(params.get("impact") or []),
        "source": params.get("source"),
        "affected": sorted(params.get("affected") or []),
        "affected_users": len(params.get("affected_users") or []),
        "owner": params.get("owner"),
        "site": params.get("site"),
        "key": key,
        "at": now,
        "expires": params.get("expires") or expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    try:
        Stream(case, RUN).append("opened", body)
    except Moved:
        head = _head(case)
        return False if head is not None and head.body.get("key") == key else None
    return True


def continued(case: Case, params: dict[str, Any]) -> dict[str, Any]:
    """The state of an incident that is gone on with; refuses what is closed or was left alone for too long."""
    state = state_of(case)
    if state.get("closed"):
        raise Refused(f"incident_id: {case.id} is closed; open a new incident (firebreak_incident_new: true)")
    idle = case.context.clock() - datetime.datetime.fromisoformat(state["last"]).timestamp()
    if idle > IDLE_HOURS * 3600 and not params.get("incident_id"):
        raise Refused(
            f"incident_id: {case.id} ({state['title']}, {state['severity']}) was left alone for {idle / 3600:.0f} h; "
            f"go on with firebreak_incident_id={case.id}, or open another with firebreak_incident_new=true"
        )
    return state


def begin_round(case: Case, state: dict[str, Any], number: int) -> bool:
    """A second round rotates, revokes and snapshots again: its start is the time that these count from."""
    if str(number) in state["rounds"]:
        return False
    if number != len(state["rounds"]) + 1:
        raise Refused(
            f"round: {case.id} is in round {len(state['rounds'])}; the next one is {len(state['rounds']) + 1}"
        )
    if case.context.check_mode:
        return True
    at = case.store.at_latest()
    case.record(RUN, "note", {"text": f"round {number} begins", "begins_round": number, "at": at})
    state["rounds"][str(number)] = at
    return True


def view(case: Case) -> dict[str, Any]:
    """incident.json, made anew; it says from how many entries, so that it can be verified."""
    entries = entries_of(case, RUN)
    with contextlib.suppress(StoreUnavailable):
        case.store.replace(f"{case.id}/incident.json", canonical(shown_in_view(case, entries)))
    return fold(entries)


def shown_in_view(case: Case, entries: list[Entry]) -> dict[str, Any]:
    state = {key: value for key, value in fold(entries).items() if key not in ("key", "seals")}
    return {"id": case.id, "as_of": len(entries), **state}
