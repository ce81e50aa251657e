# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The same playbooks with the case in S3: nobody can rewrite it, another machine takes over, and a lost store ends nothing."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from lab.client import Lab
from tests import dumps, helpers
from tests.buckets import BUCKET, Bucket
from tests.dumps import CONTAINED, contained
from tests.runs import Run, extra, finish, kill, lab_in, run, start


def wait(condition: Callable[[], bool], process: Any, record: Path) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None and time.monotonic() < end, (record.parent / "output").read_text()
        time.sleep(0.02)


# --- one case from its opening to its release, on two machines


@dataclasses.dataclass
class Story:
    lab: Lab
    bucket: Bucket
    runs: dict[str, Run]
    dumps: dict[str, dict[str, Any]]
    left: list[dict[str, Any]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("s3")
    with lab_in(folder / "lab") as lab:
        bucket = Bucket(lab, "story")
        here, there = (
            {"HOME": str(folder / name), "FIREBREAK_SPOOL": str(folder / name / "spool")} for name in ("here", "there")
        )
        told = Story(lab, bucket, {}, {"before": dumps.everything(lab)}, [])
        store = extra(firebreak_case_store=bucket.uri)
        told.runs["open"] = run(lab, "open", *store, *extra(firebreak_type="data_breach"), **here)
        process, record = start(lab, "data_breach", *store, **here)
        wait(lambda: len([key for key in bucket.keys("/journal/") if "/_run/" not in key]) >= 4, process, record)
        kill(process)
        told.left = bucket.entries()
        told.runs["takeover"] = run(lab, "data_breach", *store, **there)
        told.dumps["contained"] = dumps.everything(lab)
        words = [*store, *extra(firebreak_incident_id=told.runs["open"].incident)]
        expect = extra(firebreak_expect=told.runs["takeover"].expect)
        told.runs["verify"] = run(lab, "verify_case", *words, *expect, **here)
        told.runs["release check"] = run(lab, "release", *words, "--check", **here)
        told.runs["release"] = run(lab, "release", *words, **here)
        told.dumps["released"] = dumps.everything(lab)
        told.runs["verify again"] = run(lab, "verify_case", *words, *expect, **there)
        yield told


def test_each_run_ends_well(story: Story) -> None:
    assert {name: done.output for name, done in story.runs.items() if done.code} == {}


def test_another_machine_takes_over(story: Story) -> None:
    """It knows nothing but the store; the run before was killed in the middle."""
    assert 4 <= len([entry for entry in story.left if entry["stream"] != "_run"]) < 20
    assert story.runs["takeover"].incident == story.runs["open"].incident
    assert story.runs["takeover"].open == set()
    runs = {entry["run"] for entry in story.bucket.entries() if entry["kind"] in ("intent", "done")}
    assert len(runs) >= 2
    kinds = [(entry["stream"], change["action"], change["target"]) for entry in story.bucket.entries() if entry["kind"] == "intent"
             for change in entry["body"].get("changes", []) if "releases" not in entry["body"]]  # fmt: skip
    assert len(kinds) == len(set(kinds))


def test_nothing_of_it_is_on_this_machine(story: Story) -> None:
    assert list((story.lab.dir / "cases").iterdir()) == []
    assert list(story.lab.dir.parent.rglob("spool/**/*.json")) == []


def test_the_release_puts_everything_back(story: Story) -> None:
    before = story.dumps["before"]
    expected = dumps.but_for_what_is_final(before, before)
    after = dumps.but_for_what_is_final(story.dumps["released"], before)
    for part in expected:
        assert after[part] == expected[part], part
    assert story.dumps["contained"]["postgresql"] != before["postgresql"]


def test_the_case_is_proved(story: Story) -> None:
    for name in ("verify", "verify again"):
        seen = story.runs[name].of("case_verify_info")[-1]
        assert seen["valid"] and seen["entries"] > 30
    assert len(story.bucket.keys("/journal/")) == seen["entries"]


def test_what_is_final_is_listed(story: Story) -> None:
    reported = story.runs["takeover"].of("incident_info")[-1]["irreversible"]
    assert helpers.unlisted(reported) == helpers.unreported(reported) == []


def test_nobody_can_delete_an_entry(story: Story) -> None:
    s3 = story.bucket.client
    keys = [*story.bucket.keys("/journal/"), *story.bucket.keys("/evidence/")]
    assert len(keys) > 30
    for key in keys:
        versions = s3.list_object_versions(Bucket=BUCKET, Prefix=key)["Versions"]
        versions = [version for version in versions if version["Key"] == key]
        assert len(versions) == 1, key
        lock = s3.get_object_retention(Bucket=BUCKET, Key=key, VersionId=versions[0]["VersionId"])["Retention"]
        assert lock["Mode"] == "GOVERNANCE" and lock["RetainUntilDate"].timestamp() > time.time() + 3600
    with pytest.raises(ClientError) as refused:
        s3.delete_object(Bucket=BUCKET, Key=key, VersionId=versions[0]["VersionId"])
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403)


def test_a_rewritten_or_hidden_entry_is_named(story: Story) -> None:
    """What the lock cannot hinder, a new version or a delete marker, shows."""
    incident = story.runs["open"].incident
    key = next(key for key in story.bucket.keys("/journal/pg1/") if key.endswith("2.json"))
    story.bucket.client.put_object(Bucket=BUCKET, Key=key, Body=story.bucket.get(key))
    words = [*extra(firebreak_case_store=story.bucket.uri), *extra(firebreak_incident_id=incident)]
    done = run(story.lab, "verify_case", *words)
    assert done.code != 0 and "pg1/2: it was written over" in done.of("case_verify_info")[-1]["msg"], done.output
    hidden = story.bucket.keys("/journal/cf/")[-1]
    story.bucket.client.delete_object(Bucket=BUCKET, Key=hidden)
    done = run(story.lab, "verify_case", *words)
    named = " ".join(one["entry"] for one in done.of("case_verify_info")[-1]["bad"])
    assert done.code != 0 and "cf/" in named and "pg1/" in named, done.output


# --- the store is lost in the middle


def test_a_lost_store_ends_nothing_that_can_be_undone(tmp_path: Path) -> None:
    with lab_in(tmp_path / "lab") as lab:
        before = dumps.everything(lab)
        bucket = Bucket(lab, "lost")
        store = extra(firebreak_case_store=bucket.uri)
        spool = tmp_path / "spool"
        began = time.monotonic()
        process, record = start(lab, "data_breach", *store, FIREBREAK_SPOOL=str(spool))
        wait(lambda: begun(bucket), process, record)
        lab.kill("s3")
        lost = finish(process, record, began)
        assert lost.code != 0
        assert contained(lab) == {"cf", "pg1"}, lost.output  # what can be undone goes on, the rest needs its record
        kept = [json.loads(path.read_bytes()) for path in sorted(spool.rglob("*.json"))]
        assert {entry["kind"] for entry in kept} >= {"intent", "done"}
        assert not any(secret in json.dumps(kept) for secret in lab.secrets())
        for control in ("redis_session_revocation", "vault_kv_rotation"):
            told = " ".join(result.get("msg", "") for result in lost.of(control))
            assert "case_store" in told and "break glass" in told, (control, told)
        assert "NOT SAFE" in lost.screen and str(spool) in lost.screen, lost.screen
        assert "fence" in lost.screen or "default_transaction_read_only" in lost.screen

        lab.start("s3")
        back = run(lab, "data_breach", *store, FIREBREAK_SPOOL=str(spool))
        assert back.code == 0, back.output
        assert contained(lab) == set(CONTAINED)
        assert list(spool.rglob("*.json")) == []
        assert [entry for entry in bucket.entries() if "spooled" in entry["body"]]
        words = [*store, *extra(firebreak_incident_id=back.incident)]
        assert run(lab, "verify_case", *words, *extra(firebreak_expect=back.expect)).code == 0
        assert run(lab, "release", *words).code == 0
        after = dumps.but_for_what_is_final(dumps.everything(lab), before)
        assert after == dumps.but_for_what_is_final(before, before)


def begun(bucket: Bucket) -> bool:
    """Whether the fence has begun."""
    return any(json.loads(bucket.get(key))["body"].get("begins") == "fence" for key in bucket.keys("/journal/_run/"))
