# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever is done to a case is found, the first bad entry is named, and nothing is accused that the engine wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.firebreak.incident.plugins.module_utils import _action, _case, _incident, _store
from ansible_collections.firebreak.incident.plugins.module_utils._case import Case, canonical, digest_of, open_case
from ansible_collections.firebreak.incident.plugins.module_utils._control import Context
from ansible_collections.firebreak.incident.plugins.module_utils._errors import StoreUnavailable
from ansible_collections.firebreak.incident.plugins.module_utils._verify import seal, verify
from ansible_collections.firebreak.incident.plugins.modules import incident
from lab.client import Lab
from tests import helpers
from tests.buckets import Bucket
from tests.contract.rotation_walk import LocalHost
from tests.runs import extra, run
from tests.truth import FULL, budget

FLIPS = budget(400, 8000)
PAIRS = budget(50, 500)
WHILE = budget(1.0, 10.0)  # seconds
HOST = "pg1"
TARGET = "cloudflare_ip_list"
LARGE = "a long story, " * 2000
SHARED = {"site": "lab", "owner": "lab"}


@dataclasses.dataclass
class Written:
    """A case on disk, and the hash of its last seal."""

    store: Path
    incident: str
    sent: str

    def case(self) -> Case:
        params = {**SHARED, "case_store": f"file://{self.store}", "incident_id": self.incident}
        return open_case(params, Context(run_id="reader"))

    def verify(self, expect: str | None = None) -> dict[str, Any]:
        return verify(self.case(), expect)

    @property
    def top(self) -> Path:
        return self.store / self.incident

    def files(self, part: str = "") -> list[Path]:
        return sorted(path for path in (self.top / part).rglob("*") if path.is_file() and "locks" not in path.parts)

    def entry(self, name: str, seq: int) -> Path:
        return self.top / "journal" / name / f"{seq:08d}.json"

    def last(self, name: str) -> int:
        return len(list((self.top / "journal" / name).glob("*.json")))

    def copy(self, folder: Path) -> Written:
        shutil.copytree(self.top, folder / self.incident)
        return dataclasses.replace(self, store=folder)


def sealed(case: Case) -> str:
    digest = seal(case).digest
    _incident.view(case)
    return digest


@pytest.fixture(scope="module")
def written(lab: Lab) -> Written:
    """What every control writes, in one incident; some of it is released, and one entry has a large body."""
    store = f"file://{lab.dir}/proved"
    incident_id = helpers.open_incident(lab, store, HOST)
    case = Written(lab.dir / "proved", incident_id, "")
    for name in helpers.controls():
        row = helpers.row_of(name)
        row.prepare(lab)
        params = {**row.params(lab), **helpers.surroundings(lab, store, row.host, incident_id), "host": row.host}
        result = helpers.execute(helpers.module_of(name).CONTROL, params, host=LocalHost())
        assert result.get("changed"), result
        if row.reversible and name == TARGET:
            released = helpers.release(lab, store, name, params, incident_id)
            assert released.get("changed"), released
            sealed(case.case())
    case.case().record(HOST, "note", {"text": LARGE})
    case.case().record("_run", "note", {"text": LARGE + "of the run itself"})
    sealed(case.case())
    case.case().record(HOST, "note", {"text": "after this a seal is sent out"})
    case.case().record(HOST, "note", {"text": "and after this"})
    return dataclasses.replace(case, sent=sealed(case.case()))


@pytest.fixture
def case(written: Written, tmp_path: Path) -> Written:
    """A copy that may be damaged."""
    return written.copy(tmp_path)


# --- what the engine wrote is valid, and read once


def test_what_every_control_wrote_is_valid(written: Written) -> None:
    seen = written.verify(written.sent)
    assert seen["valid"], seen["first_bad"]
    assert seen["entries"] == len(written.files("journal")) >= 20
    assert seen["streams"] == len(list((written.top / "journal").iterdir())) >= 5
    assert len(written.files("blobs")) >= 2 and len(written.files("evidence")) >= 2 and len(seen["seals"]) == 3


def test_each_entry_is_read_once(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    real = _store._read

    def counted(path: str, *more: Any) -> bytes | None:
        asked[path] += 1
        return real(path, *more)

    monkeypatch.setattr(_store, "_read", counted)
    assert written.verify()["valid"]
    assert {str(path) for path in written.files("journal")} <= asked.keys()
    assert max(asked.values()) == 1, asked.most_common(3)


def test_what_a_copy_and_a_killed_run_leave_is_no_forgery(case: Written) -> None:
    for path in case.files():
        path.chmod(random.Random(path.name).choice([0o400, 0o644, 0o666]))
    (case.entry(HOST, 1).parent / ".new-abcd").write_bytes(b'{"half":')
    (case.top / "blobs" / ("ab" * 32)).write_bytes(b"of an entry that was never written")
    (case.top / "evidence" / "cf" / "1" / "0123456789abcdef").mkdir(parents=True)
    (case.top / "evidence" / "cf" / "1" / "0123456789abcdef" / "log.csv").write_bytes(b"half")
    (case.top / "incident.json").unlink()  # a view, that is made anew with the next seal
    assert case.verify(case.sent)["valid"]


class Killed(BaseException):
    """As by kill -9: nothing of the engine goes on after it."""


def test_an_export_whose_run_was_killed_is_covered_by_the_next(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its manifest, but no run had said so in the chain."""
    store = f"file://{tmp_path}"
    incident_id = helpers.open_incident(lab, store, HOST)
    names = [name for name in helpers.controls() if helpers.module_of(name).CONTROL.evidence]
    for name in names:
        row = helpers.row_of(name)
        row.prepare(lab)
        params = {**row.params(lab), **helpers.surroundings(lab, store, row.host, incident_id), "host": row.host}
        with monkeypatch.context() as patch:
            patch.setattr(_action.Action, "_outcome", killed)
            with pytest.raises(Killed):
                helpers.execute(helpers.module_of(name).CONTROL, params, host=LocalHost())
        assert not helpers.execute(helpers.module_of(name).CONTROL, params, host=LocalHost())["changed"]
    case = Written(tmp_path, incident_id, "")
    assert case.verify()["valid"] and names
    for path in [path for path in case.files("evidence") if path.suffix != ".json"]:
        flip(path, 0)
        assert "artefact" in case.verify()["first_bad"]["why"], path
        flip(path, 0)


def killed(*_args: Any) -> None:
    raise Killed


# --- bytes


def blamed(case: Written) -> dict[Path, str]:
    """Which entry is named when a file is not what it was."""
    found: dict[Path, str] = {case.top / "incident.json": "incident.json"}
    for path in case.files("journal"):
        where = f"{path.parent.name}/{int(path.stem)}"
        found[path] = where
        body = json.loads(path.read_bytes())["body"]
        if body.keys() == {"blob"}:
            found[case.top / "blobs" / body["blob"]] = where
            body = json.loads((case.top / "blobs" / body["blob"]).read_bytes())
        for artefact in body.get("manifests") or {}:
            manifest = case.top / "evidence" / path.parent.name.removesuffix(".evidence") / "1" / f"{artefact}.json"
            found[manifest] = found[case.store / json.loads(manifest.read_bytes())["key"]] = where
    return found


def order(where: str) -> tuple[int, str, int]:
    name, _slash, number = where.rpartition("/")
    return (0 if name == "_run" else 1 if name else 2, name, int(number) if name else 0)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flips(case: Written, number: int) -> Iterator[list[tuple[Path, int]]]:
    """Random bits of random files, every file among them."""
    seed = random.randrange(1 << 32) if FULL else 7
    chosen = random.Random(seed)
    files = list(blamed(case))
    for count in range(number):
        path = files[count] if count < len(files) else chosen.choice(files)
        yield [(path, chosen.randrange(8 * path.stat().st_size)) for path in (path, chosen.choice(files))]


def test_a_flipped_bit_is_named(case: Written, record_property: Callable[[str, object], None]) -> None:
    known = blamed(case)
    assert {path for path in case.files() if path.name != "log.csv"} == known.keys()
    for (path, bit), _other in flips(case, FLIPS):
        flip(path, bit)
        seen = case.verify()["first_bad"]
        flip(path, bit)
        assert seen.get("entry") == known[path] and seen["why"], (path, bit, seen)
    assert case.verify(case.sent)["valid"]
    record_property("tried", FLIPS)
    record_property("of", sum(8 * path.stat().st_size for path in known))


def test_of_two_flipped_bits_the_first_is_named(case: Written, record_property: Callable[[str, object], None]) -> None:
    known = blamed(case)
    for pair in flips(case, PAIRS):
        if len({path for path, _bit in pair}) < 2:
            continue
        for path, bit in pair:
            flip(path, bit)
        seen = case.verify()["first_bad"]
        for path, bit in pair:
            flip(path, bit)
        assert seen["entry"] == min((known[path] for path, _bit in pair), key=order), (pair, seen)
    record_property("tried", PAIRS)


# --- entries


def doc_of(path: Path) -> dict[str, Any]:
    doc: dict[str, Any] = json.loads(path.read_bytes())
    return doc


def put(path: Path, doc: dict[str, Any]) -> None:
    """An entry with the digest that fits it."""
    doc.pop("digest", None)
    body = doc["body"]
    if body.keys() == {"blob"}:
        stored = json.loads((path.parents[2] / "blobs" / body["blob"]).read_bytes())
        doc["digest"] = digest_of({**doc, "body": stored})
    else:
        doc["digest"] = digest_of(doc)
    path.write_bytes(canonical(doc))


def change(path: Path, **changed: Any) -> None:
    put(path, {**doc_of(path), **changed})


def rewrite(case: Written, name: str, start: int, **changed: Any) -> None:
    """An entry changed, and the whole chain behind it made to fit."""
    change(case.entry(name, start), **changed)
    for seq in range(start + 1, case.last(name) + 1):
        change(case.entry(name, seq), prev=doc_of(case.entry(name, seq - 1))["digest"])


def bytes_of(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def instead(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def reordered(data: bytes) -> bytes:
    return json.dumps(dict(reversed(json.loads(data).items())), separators=(",", ":"), ensure_ascii=False).encode()


def moved(data: bytes) -> bytes:
    """The digest in another place: the same bytes are hashed, and any parser reads the same."""
    doc = json.loads(data)
    member = b'"digest":"%s",' % doc["digest"].encode()
    return b"{" + member + data.replace(member, b"")[1:]


def nested(data: bytes) -> bytes:
    """The digest inside of the body: the same bytes are hashed, but who parses them finds none."""
    member = b'"digest":"%s",' % json.loads(data)["digest"].encode()
    return data.replace(member, b"").replace(b'"body":{', b'"body":{' + member, 1)


def other_case(case: Written) -> bytes:
    """The second entry of this host's stream in another case."""
    store = case.store.with_name(f"{case.store.name}-other")
    params = {**SHARED, "case_store": f"file://{store}", "host": HOST}
    opened = helpers.execute(incident.CONTROL, {**params, "type": "data_breach", "affected": [HOST], "key": "other"})
    other = Written(store, str(opened["incident_id"]), "")
    for number in range(3):
        other.case().record(HOST, "note", {"text": str(number)})
    doc = doc_of(other.entry(HOST, 2))
    return canonical(
        {**doc, "incident": "INC-2020-0101-001", "digest": digest_of({**doc, "incident": "INC-2020-0101-001"})}
    )


def forge_all(case: Written) -> None:
    """Everything anew: a stream, all seals over it, and what hangs on them."""
    rewrite(case, HOST, 2, actor="nobody")
    for seq in range(2, case.last("_run") + 1):
        doc = doc_of(case.entry("_run", seq))
        for name, head in doc["body"].get("heads", {}).items():
            head[1] = doc_of(case.entry(name, head[0]))["digest"]
        put(case.entry("_run", seq), {**doc, "prev": doc_of(case.entry("_run", seq - 1))["digest"]})


def cut(case: Written, name: str, number: int) -> None:
    for _entry in range(number):
        case.entry(name, case.last(name)).unlink()


Damage = Callable[[Written], Any]
SECOND = f"{HOST}/2"
# What is done to a case, the entry that is named, and a word of what is said.
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "dropped": (lambda c: c.entry(HOST, 2).unlink(), SECOND, "missing"),
    "the first dropped": (lambda c: c.entry(HOST, 1).unlink(), f"{HOST}/1", "missing"),
    "two swapped": (lambda c: swap(c.entry(HOST, 2), c.entry(HOST, 3)), SECOND, "belongs to"),
    "two of different streams swapped": (lambda c: swap(c.entry(HOST, 2), c.entry("cf", 2)), "cf/2", "belongs to"),
    "duplicated": (lambda c: shutil.copy(c.entry(HOST, 1), c.entry(HOST, 2)), SECOND, "belongs to"),
    "an old one added": (
        lambda c: shutil.copy(c.entry(HOST, 1), c.entry(HOST, c.last(HOST) + 1)),
        "the next",
        "belongs to",
    ),
    "one of another case": (lambda c: c.entry(HOST, 2).write_bytes(other_case(c)), SECOND, "INC-2020"),
    "forged": (lambda c: change(c.entry(HOST, 2), actor="nobody"), f"{HOST}/3", "does not follow"),
    "backdated": (lambda c: change(c.entry(HOST, 2), time="2020-01-01T00:00:00Z"), f"{HOST}/3", "does not follow"),
    "the newest backdated": (
        lambda c: change(c.entry(HOST, c.last(HOST)), time="2020-01-01T00:00:00Z"),
        "the newest",
        "seal 3",
    ),
    "a chain rewritten": (lambda c: rewrite(c, HOST, 2, actor="nobody"), "the first sealed", "seal 2"),
    "the tail cut": (lambda c: cut(c, HOST, 1), "the next", "seal 3"),
    "a stream deleted": (lambda c: shutil.rmtree(c.entry("cf", 1).parent), "cf/1", "missing"),
    "the run's stream deleted": (lambda c: shutil.rmtree(c.entry("_run", 1).parent), "_run/1", "first entry"),
    "no case left": (lambda c: shutil.rmtree(c.top / "journal"), "_run/1", "first entry"),
    "truncated": (lambda c: bytes_of(c.entry(HOST, 2), lambda data: data[:-20]), SECOND, "not readable"),
    "emptied": (lambda c: c.entry(HOST, 2).write_bytes(b""), SECOND, "not readable"),
    "a byte behind it": (lambda c: bytes_of(c.entry(HOST, 2), lambda data: data + b"\n"), SECOND, "does not match"),
    "a text behind it": (lambda c: bytes_of(c.entry(HOST, 2), lambda data: data + b"{}"), SECOND, "not readable"),
    "spaces in it": (
        lambda c: bytes_of(c.entry(HOST, 2), lambda data: json.dumps(json.loads(data)).encode()),
        SECOND,
        "does not match",
    ),
    "other order": (lambda c: bytes_of(c.entry(HOST, 2), reordered), SECOND, "does not match"),
    "the digest moved": (lambda c: bytes_of(c.entry(HOST, 2), moved), SECOND, "does not match"),
    "the digest nested": (lambda c: bytes_of(c.entry(HOST, 2), nested), SECOND, "not readable"),
    "a key twice": (
        lambda c: bytes_of(c.entry(HOST, 2), lambda data: b'{"actor":"nobody",' + data[1:]),
        SECOND,
        "does not match",
    ),
    "a digest twice": (
        lambda c: bytes_of(c.entry(HOST, 2), lambda data: b'{"digest":"%s",' % (b"0" * 64) + data[1:]),
        SECOND,
        "does not match",
    ),
    "UTF-16": (lambda c: bytes_of(c.entry(HOST, 2), lambda d: d.decode().encode("utf-16")), SECOND, "not match"),
    "no object": (lambda c: c.entry(HOST, 2).write_bytes(b"[]"), SECOND, "not readable"),
    "nothing in it": (lambda c: c.entry(HOST, 2).write_bytes(b"{}"), SECOND, "not readable"),
    "too deep": (lambda c: c.entry(HOST, 2).write_bytes(b'{"body":' + b"[" * 200_000), SECOND, "not readable"),
    "too long": (lambda c: os.truncate(c.entry(HOST, 2), 1 << 40), SECOND, "not readable"),
    "a number too long": (lambda c: c.entry(HOST, 2).write_bytes(b"9" * 9999), SECOND, "not readable"),
    "a link": (
        lambda c: instead(c.entry(HOST, 2), lambda path: path.symlink_to(path.with_name("00000001.json"))),
        SECOND,
        "a link",
    ),
    "a pipe": (lambda c: instead(c.entry(HOST, 2), os.mkfifo), SECOND, "no file"),
    "a folder": (lambda c: instead(c.entry(HOST, 2), Path.mkdir), SECOND, "missing"),
    "the newest is a link": (
        lambda c: instead(c.entry("_run", c.last("_run")), lambda path: path.symlink_to("/dev/zero")),
        "the run's next",
        "a link",
    ),
    "a linked stream": (
        lambda c: c.entry("cf", 1).parent.rename(c.top / "cf") and (c.top / "journal/cf").symlink_to(c.top / "cf"),
        "cf/1",
        "missing",
    ),
    "a foreign file": (lambda c: (c.entry(HOST, 1).with_name("notes.txt")).write_text("x"), f"journal/{HOST}/notes.txt", "no entry"),
    "a foreign file beside the streams": (lambda c: (c.top / "journal/x").write_text("x"), "journal/x", "no entry"),
    "a number below one": (lambda c: c.entry(HOST, 0).write_text("{}"), f"journal/{HOST}/00000000.json", "no entry"),
    "a stream below a stream": (
        lambda c: shutil.copytree(c.entry("cf", 1).parent, c.entry(HOST, 1).parent / "cf"),
        f"{HOST}/cf/1",
        "no entry",
    ),
    "a foreign stream": (
        lambda c: shutil.copytree(c.entry("cf", 1).parent, c.top / "journal" / "zz"), "zz/1", "belongs to"
    ),
    "a seal that says nothing": (lambda c: rewrite(c, "_run", c.last("_run"), body={}), "the run's newest", "seal"),
    "a seal of something else": (
        lambda c: rewrite(c, "_run", c.last("_run"), body={"turn": 1, "heads": {HOST: "x"}}),
        "the run's newest",
        "seal",
    ),
    "a view of something else": (lambda c: (c.top / "incident.json").write_text("[" * 100_000), "incident.json", "say"),
    "a view of more than there is": (
        lambda c: (c.top / "incident.json").write_text('{"as_of": 10000}'), "incident.json", "say"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_first_bad_entry_is_named(case: Written, damage: str) -> None:
    do, where, why = DAMAGES[damage]
    heads = json.loads(case.entry("_run", case.last("_run")).read_bytes())["body"]["heads"]
    known = {
        "the next": f"{HOST}/{case.last(HOST) + (damage != 'the tail cut')}",
        "the newest": f"{HOST}/{heads[HOST][0]}",
        "the run's newest": f"_run/{case.last('_run')}",
        "the run's next": f"_run/{case.last('_run')}",
        "the first sealed": f"{HOST}/{first_sealed(case)}",
    }
    do(case)
    seen = case.verify()
    assert not seen["valid"]
    assert seen["first_bad"]["entry"] == known.get(where, where), seen["bad"]
    assert why in seen["first_bad"]["why"], seen["bad"]


def first_sealed(case: Written) -> int:
    """The head that the first seal over the second entry of the stream names."""
    bodies = [doc_of(case.entry("_run", seq))["body"] for seq in range(1, case.last("_run") + 1)]
    return next(int(body["heads"][HOST][0]) for body in bodies if body.get("heads", {}).get(HOST, [0])[0] >= 2)


@pytest.mark.parametrize("damage", ["everything rewritten", "the run's tail cut"])
def test_a_cut_and_a_case_written_anew_are_found_by_the_hash_that_was_sent_out(case: Written, damage: str) -> None:
    (case.top / "incident.json").unlink()
    if damage == "everything rewritten":
        forge_all(case)
    else:
        cut(case, "_run", 1)
    assert case.verify()["valid"], "nothing in the case itself can show it"
    seen = case.verify(case.sent)
    assert seen["first_bad"]["entry"] == "_run" and "expected hash" in seen["first_bad"]["why"]


@pytest.mark.parametrize("damage", ["too deep", "a foreign file", "a number below one", "emptied"])
def test_a_damaged_case_still_takes_entries(case: Written, damage: str) -> None:
    """What an intruder leaves in the journal stops nobody from containing; where the chain itself ends, that is told."""
    DAMAGES[damage][0](case)
    heads = case.case().heads()
    assert heads[HOST].seq == case.last(HOST) - (damage in ("a number below one",))
    case.case().record(HOST, "note", {"text": "goes on"})
    case.entry(HOST, heads[HOST].seq + 1).write_bytes(b"[" * 200_000)
    with pytest.raises(StoreUnavailable, match="is not readable"):
        case.case().record(HOST, "note", {"text": "does not"})


@pytest.mark.parametrize("damage", [None, "dropped", "forged"])
def test_the_playbook_names_it(lab: Lab, case: Written, damage: str | None) -> None:
    if damage:
        DAMAGES[damage][0](case)
    words = extra(firebreak_case_store=f"file://{case.store}", firebreak_incident_id=case.incident)
    done = run(lab, "verify_case", *words, *extra(firebreak_expect=case.sent))
    assert (done.code == 0) == (damage is None), done.output
    told = done.of("case_verify_info")[-1]
    if damage:
        assert f"{DAMAGES[damage][1]}: " in told["msg"] and DAMAGES[damage][2] in told["msg"]
    else:
        assert told["valid"] and told["entries"] == len(case.files("journal"))


# --- nothing is accused falsely


def stores(lab: Lab, tmp_path: Path, scheme: str) -> dict[str, Any]:
    return {"case_store": f"file://{tmp_path}/store"} if scheme == "file" else Bucket(lab, tmp_path.name).options


def opened(options: dict[str, Any]) -> dict[str, Any]:
    """A new incident in this store."""
    full = {**SHARED, **options, "type": "data_breach", "affected": [HOST], "new": True}
    return {**SHARED, **options, "incident_id": helpers.execute(incident.CONTROL, full)["incident_id"]}


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_a_case_that_is_being_written_is_valid(lab: Lab, tmp_path: Path, scheme: str) -> None:
    """Runs go on in several streams, seals and views among them, while it is verified again and again."""
    options = opened(stores(lab, tmp_path, scheme))
    over = time.monotonic() + WHILE
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            case = open_case(options, Context(run_id=f"writer{number}"))
            while time.monotonic() < over:
                case.record(f"h{number % 2}", "note", {"text": "x" * random.choice([10, 20_000])})
                if number == 2:
                    sealed(case)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    tried = []
    while any(thread.is_alive() for thread in threads):
        tried.append(verify(open_case(options, Context(run_id="reader"))))
    for thread in threads:
        thread.join()
    assert failures == []
    assert [seen["first_bad"] for seen in tried if not seen["valid"]] == []
    last = verify(open_case(options, Context(run_id="reader")))
    assert last["valid"] and len(tried) > 1 and last["entries"] > tried[0]["entries"]


def test_what_was_kept_while_the_store_was_lost_is_no_forgery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: Lab
) -> None:
    monkeypatch.setenv("FIREBREAK_SPOOL", str(tmp_path / "spool"))
    options = opened(stores(lab, tmp_path, "file"))
    case = open_case(options, Context(run_id="one"))
    stream = case.stream(HOST)
    with monkeypatch.context() as patch:
        patch.setattr(_store.FileStore, "create", lost)
        for number in range(3):
            _case.spool(stream, "note", {"text": str(number)})
    case.record(HOST, "note", {"text": "another machine's"})
    _case.merge_spools(open_case(options, Context(run_id="two")))
    seen = verify(case)
    assert seen["valid"] and seen["entries"] == 5, seen


def lost(*_args: Any) -> Any:
    raise StoreUnavailable("case_store: gone")


# --- in S3, where nothing can be deleted, and anybody with a key can write over it and hide it


@dataclasses.dataclass
class InS3:
    bucket: Bucket
    options: dict[str, Any]
    sent: str

    def key(self, name: str, seq: int) -> str:
        return f"{self.bucket.prefix}/{self.options['incident_id']}/journal/{name}/{seq:08d}.json"

    def verify(self) -> dict[str, Any]:
        return verify(open_case(self.options, Context(run_id="reader")), self.sent)

    def forged(self, seq: int, **changed: Any) -> bytes:
        doc = {**json.loads(self.bucket.get(self.key(HOST, seq))), **changed}
        return canonical({**doc, "digest": digest_of(doc)})


@pytest.fixture
def in_s3(lab: Lab, tmp_path: Path) -> InS3:
    bucket = Bucket(lab, tmp_path.name)
    options = opened(bucket.options)
    case = open_case(options, Context(run_id="writer"))
    for number in range(3):
        case.record(HOST, "note", {"text": f"note {number}"})
    case.record(HOST, "note", {"text": LARGE})
    sealed(case)
    return InS3(bucket, options, sealed(case))


def over(case: InS3, key: str) -> None:
    case.bucket.put(key, case.bucket.get(key))


def marker_and_forgery(case: InS3) -> None:
    forged = case.forged(2, actor="nobody")
    case.bucket.hide(case.key(HOST, 2))
    case.bucket.put(case.key(HOST, 2), forged)


def shortened_and_replaced(case: InS3) -> None:
    """Who may bypass the lock ends it, deletes what stood there, and puts something else, which then is its only version."""
    forged = case.forged(2, actor="nobody")
    case.bucket.destroy(case.key(HOST, 2))
    case.bucket.put(case.key(HOST, 2), forged)


def blob(case: InS3) -> str:
    (found,) = case.bucket.keys("/blobs/")
    return found


IN_S3: dict[str, tuple[Callable[[InS3], Any], str, str]] = {
    "a delete marker": (lambda c: c.bucket.hide(c.key(HOST, 2)), f"{HOST}/2", "delete marker"),
    "a delete marker over the newest": (lambda c: c.bucket.hide(c.key(HOST, 4)), f"{HOST}/4", "delete marker"),
    "a delete marker over a seal": (lambda c: c.bucket.hide(c.key("_run", 3)), "_run/3", "delete marker"),
    "a delete marker and a forged entry over it": (marker_and_forgery, f"{HOST}/2", "delete marker"),
    "a new version": (lambda c: over(c, c.key(HOST, 2)), f"{HOST}/2", "2 versions"),
    "a forged version": (lambda c: c.bucket.put(c.key(HOST, 3), c.forged(3, actor="nobody")), f"{HOST}/3", "2 versions"),
    "deleted for good": (lambda c: c.bucket.destroy(c.key(HOST, 2)), f"{HOST}/2", "missing"),
    "the newest deleted for good": (lambda c: c.bucket.destroy(c.key(HOST, 4)), f"{HOST}/4", "seal 1"),
    "deleted for good and forged": (shortened_and_replaced, f"{HOST}/3", "does not follow"),
    "a blob hidden": (lambda c: c.bucket.hide(blob(c)), f"{HOST}/4", "missing"),
    "a blob written over": (lambda c: c.bucket.put(blob(c), b"{}"), f"{HOST}/4", "altered"),
    "a foreign object": (lambda c: c.bucket.put(c.key(HOST, 1) + ".txt", b"x"), f"journal/{HOST}/00000001.json.txt", "no entry"),
    "a seal deleted for good": (lambda c: c.bucket.destroy(c.key("_run", 3)), "_run", "expected hash"),
}  # fmt: skip


@pytest.mark.parametrize("damage", IN_S3)
def test_the_first_bad_entry_is_named_in_s3(in_s3: InS3, damage: str) -> None:
    assert in_s3.verify()["valid"]
    do, where, why = IN_S3[damage]
    do(in_s3)
    seen = in_s3.verify()
    assert seen["first_bad"].get("entry") == where and why in seen["first_bad"]["why"], seen


def test_each_entry_is_fetched_once_and_the_waits_overlap(in_s3: InS3, monkeypatch: pytest.MonkeyPatch) -> None:
    case = open_case(in_s3.options, Context(run_id="writer"))
    for number in range(60):
        case.record(HOST, "note", {"text": f"one more {number}"})
    asked: Counter[str] = Counter()
    at_once = [0]
    most = [0]
    real = _store.S3Store._call

    def counted(store: Any, operation: str, missing: bool = False, **arguments: Any) -> Any:
        asked[f"{operation} {arguments.get('Key')}"] += 1
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            return real(store, operation, missing, **arguments)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(_store.S3Store, "_call", counted)
    assert in_s3.verify()["valid"]
    entries = [key for key in in_s3.bucket.keys("/journal/") if key.startswith(in_s3.key(HOST, 1)[:-13])]
    assert len(entries) == 64 and all(asked[f"get_object {key}"] == 1 for key in entries)
    assert max(count for call, count in asked.items() if call.startswith("get_object")) == 1
    assert 2 <= most[0] <= 2 * _store.SIDE_BY_SIDE
