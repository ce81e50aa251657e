# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab keeps its promises: real servers with their data, doors that close, users who are served."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import smtplib
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lab import ROOT
from lab.actor import Client
from lab.client import Lab
from lab.parts.services import request
from tests.conftest import end_lab, start_lab

JSON = {"Content-Type": "application/json"}


def database(lab: Lab, user: str = "postgres", port: str | None = None) -> psycopg.Connection[Any]:
    env = lab.env
    return psycopg.connect(
        host=env["PGHOST"],
        port=port or env["PGPORT"],
        dbname="divan",
        user=user,
        password=env["PGPASSWORD"],
        autocommit=True,
    )


def login(lab: Lab, number: int = 100) -> dict[str, str]:
    person = {name: lab.users[number][name] for name in ("email", "password")}
    status, body = request("POST", lab.app_url + "/api/auth/login", person, JSON, source="127.0.2.9")
    assert status == 200
    return body


def me(url: str, token: str) -> int:
    return request("GET", f"{url}/api/me", headers={"Authorization": f"Bearer {token}"}, source="127.0.2.9")[0]


def proof(lab: Lab, name: str, value: str) -> bool:
    nonce = secrets.token_hex(16)
    status, body = request("GET", f"{lab.app_direct_url}/internal/secret-proof?name={name}&nonce={nonce}")
    return status == 200 and body["hmac"] == hmac.digest(value.encode(), bytes.fromhex(nonce), "sha256").hex()


# What is there


def test_first_login_within_three_seconds(lab: Lab, tmp_path: Path) -> None:
    """The best of three, on cores that are free: where several wait for each core, the lab waits with them."""
    allowed = 3 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    seconds = [lab.state["first_login_after"]]
    while seconds[-1] > allowed and len(seconds) < 3:
        process = start_lab(tmp_path)
        seconds.append(Lab(tmp_path).state["first_login_after"])
        end_lab(process)
    assert 0 < min(seconds) <= allowed, seconds


def test_says_what_is_real_and_what_is_a_double(lab: Lab) -> None:
    kinds = {name: part["kind"] for name, part in lab.state["parts"].items()}
    assert {kinds[name] for name in ("pg1", "pg2", "cache1", "app", "sinks", "ssh")} == {"real"}
    assert kinds["cf"] == "double"
    assert {kinds[name] for name in ("vault", "s3", "pool1")} <= {"real", "double"}
    for part in lab.state["parts"].values():
        assert part["status"] == "off" or psutil.pid_exists(part["pid"])


def test_nobody_else_can_read_the_lab(lab: Lab) -> None:
    assert stat.S_IMODE(lab.dir.stat().st_mode) == 0o700
    for name in ("inventory.yml", "env", "state.json", "run/stolen.json", "run/users.json", "app/app.env"):
        assert stat.S_IMODE((lab.dir / name).stat().st_mode) == 0o600


def test_no_secret_in_the_list_of_processes_or_in_a_log(lab: Lab) -> None:
    login(lab)
    supervisor = psutil.Process(lab.state["pid"])
    shown = [" ".join(process.cmdline()) for process in (supervisor, *supervisor.children(recursive=True))]
    shown += [path.read_text(errors="replace") for path in (lab.dir / "log").iterdir()]
    assert len(lab.secrets()) > 10
    for value in lab.secrets():
        assert not any(value in text for text in shown)


def test_database_has_its_data_and_the_standby_follows(lab: Lab) -> None:
    with database(lab) as primary, database(lab, port=str(lab.hostvars("pg2")["firebreak_postgresql_port"])) as standby:
        assert primary.execute("SELECT count(*) FROM users").fetchone() == (200,)
        assert primary.execute("SELECT count(*) >= 5000 FROM audit_logs").fetchone() == (True,)
        assert standby.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
        mark = secrets.token_hex(8)
        primary.execute("UPDATE users SET note = %s WHERE id = 199", (mark,))

        def seen() -> bool:
            return standby.execute("SELECT note FROM users WHERE id = 199").fetchone() == (mark,)

        lab.until(seen, "the standby does not follow", patience=5)


def test_responder_and_bystanders_log_in(lab: Lab) -> None:
    host = lab.hostvars("pg1")
    names = ("host", "port", "user", "password")
    with psycopg.connect(
        dbname="divan", **{name: host[f"firebreak_postgresql_{name}"] for name in names}
    ) as connection:
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (True,)
        roles = {row[0] for row in connection.execute("SELECT rolname FROM pg_roles WHERE rolname !~ '^pg_'")}
    assert roles == {"postgres", "firebreak", "app", "reporting", "repl", "analyst", "batch", "pooler", "readers"}


def test_cache_holds_refresh_tokens_and_things_of_others(lab: Lab) -> None:
    with redis.Redis.from_url(lab.env["REDIS_URL"], decode_responses=True) as cache:
        keys = list(cache.scan_iter("session:refresh:*", count=1000))
        assert len(keys) >= 402
        value = json.loads(str(cache.get(keys[0])))
        assert value["user_id"] == int(keys[0].split(":")[2]) and value["iat"] < time.time()
        assert cache.ttl(keys[0]) > 0
        assert len(list(cache.scan_iter("cache:*", count=1000))) == 300 and cache.hlen("flags:features") == 3


def test_cache_refuses_without_password(lab: Lab) -> None:
    port, once = lab.hostvars("cache1")["firebreak_redis_port"], Retry(NoBackoff(), 0)
    with (
        redis.Redis(port=port, retry=once) as cache,
        pytest.raises(redis.AuthenticationError),
    ):
        cache.ping()


def test_vault_holds_what_the_application_reads(lab: Lab) -> None:
    headers = {"X-Vault-Token": lab.env["VAULT_TOKEN"]}
    status, body = request("GET", f"{lab.env['VAULT_ADDR']}/v1/secret/data/app/backend", headers=headers)
    assert status == 200
    lines = (lab.dir / "app" / "app.env").read_text().splitlines()
    assert set(body["data"]["data"]) == {"JWT_SECRET", "WEBHOOK_SECRET", "BOT_TOKEN", "DATABASE_PASSWORD", "SENTRY_DSN"}
    for name, value in body["data"]["data"].items():
        assert f"{name}={value}" in lines


def test_case_bucket_has_object_lock(lab: Lab) -> None:
    env = lab.env
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL_S3"],
        region_name=env["AWS_DEFAULT_REGION"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )
    assert (
        client.get_object_lock_configuration(Bucket="cases")["ObjectLockConfiguration"]["ObjectLockEnabled"]
        == "Enabled"
    )


def test_sinks_keep_what_they_get(lab: Lab) -> None:
    where = lab.state["parts"]["sinks"]["endpoint"].split()
    mail = EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = "We are looking into it", "ops@example.com", "all@example.com"
    mail.set_content("More in an hour.")
    with smtplib.SMTP("127.0.0.1", int(where[0].rsplit(":", 1)[1])) as client:
        client.send_message(mail)
    assert request("POST", f"{where[1]}/chat", {"text": "fenced"}) == (200, "ok")
    kept = [json.loads((lab.dir / "run" / name).read_text().splitlines()[-1]) for name in ("mail.jsonl", "hook.jsonl")]
    assert kept[0]["subject"] == "We are looking into it" and kept[0]["to"] == ["all@example.com"]
    assert json.loads(kept[1]["body"]) == {"text": "fenced"} and kept[1]["path"] == "/chat"


def test_env_file_is_for_a_shell(lab: Lab) -> None:
    script = f'. "{lab.dir}/env" && "$LAB_PSQL" -At -c "SELECT count(*) FROM users" && echo "$FIREBREAK_LAB"'
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200", "1"]


def test_ansible_reaches_the_host_over_ssh_with_a_secret_as_standard_input(lab: Lab, tmp_path: Path) -> None:
    task = {"ansible.builtin.command": {"cmd": "cat", "stdin": "over ssh"}, "register": "seen"}
    check = {"ansible.builtin.assert": {"that": ["seen['stdout'] == 'over ssh'", "ansible_connection == 'ssh'"]}}
    play = tmp_path / "play.yml"
    play.write_text(json.dumps([{"hosts": "firebreak_services", "gather_facts": False, "tasks": [task, check]}]))
    program = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run([program, "-i", lab.inventory_path, play], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mechanism failed" not in done.stderr  # files go over sftp
    assert {path.name for path in (lab.dir / "app").iterdir()} == {"app.env", "app.pid", "reload"}


# The application


def test_login_refresh_and_wrong_password(lab: Lab) -> None:
    tokens = login(lab)
    assert me(lab.app_url, tokens["access_token"]) == 200
    url = lab.app_url + "/api/auth/refresh"
    status, after = request("POST", url, {"refresh_token": tokens["refresh_token"]}, JSON)
    assert status == 200 and after["refresh_token"] != tokens["refresh_token"]
    assert request("POST", url, {"refresh_token": tokens["refresh_token"]}, JSON)[0] == 401
    wrong = {"email": lab.users[100]["email"], "password": "guess"}
    assert request("POST", lab.app_url + "/api/auth/login", wrong, JSON)[0] == 401


def test_refresh_keeps_the_time_of_the_first_login(lab: Lab) -> None:
    user, identity = lab.stolen["edge"].split(".")
    with redis.Redis.from_url(lab.env["REDIS_URL"], decode_responses=True) as cache:
        # A family of our own with an old beginning: the thief's stays for others' tests.
        began = json.loads(str(cache.get(f"session:refresh:{user}:{identity}")))["iat"]
        cache.set(f"session:refresh:150:{'a' * 32}", json.dumps({"user_id": 150, "iat": began}), ex=600)
        _unused, body = request("POST", lab.app_url + "/api/auth/refresh", {"refresh_token": f"150.{'a' * 32}"}, JSON)
        held = cache.get("session:refresh:" + body["refresh_token"].replace(".", ":"))
    assert json.loads(str(held))["iat"] == began


def test_audit_log_says_who_from_where_and_for_which_incident(lab: Lab) -> None:
    mark = f"INC-{secrets.token_hex(4)}"
    person = {name: lab.users[101][name] for name in ("email", "password")}
    request("POST", lab.app_url + "/api/auth/login", person, {**JSON, "X-Correlation-Id": mark}, source="127.0.113.7")
    with database(lab) as connection:
        row = connection.execute(
            "SELECT actor, action, host(address) FROM audit_logs WHERE correlation_id = %s", (mark,)
        ).fetchone()
    assert row == (person["email"], "login", "203.0.113.7")


@pytest.mark.parametrize("door", ["edge", "direct"])
def test_webhook_asks_for_a_signature(lab: Lab, door: str) -> None:
    url = (lab.app_url if door == "edge" else lab.app_direct_url) + "/hooks/payment"
    body = b'{"reference": "order-1", "amount": 1200}'
    right = hmac.digest(lab.stolen["webhook_secret"].encode(), body, "sha256").hex()
    assert request("POST", url, body, {"X-Signature": right})[0] == 200
    assert request("POST", url, body, {"X-Signature": right[::-1]})[0] == 401
    assert request("POST", url, body)[0] == 401


def test_secret_proof_is_for_the_inside_only(lab: Lab) -> None:
    assert proof(lab, "JWT_SECRET", lab.stolen["jwt_secret"])
    assert not proof(lab, "JWT_SECRET", "something else")
    query = "/internal/secret-proof?name=JWT_SECRET&nonce=" + "ab" * 16
    assert request("GET", lab.app_url + query)[0] == 404
    assert request("GET", lab.app_direct_url + query, source="127.66.0.66")[0] == 404
    assert request("GET", lab.app_direct_url + query + "ab" * 17)[0] == 404  # long enough to be a token


def test_metrics_count_requests(lab: Lab) -> None:
    def logins() -> int:
        _unused, text = request("GET", lab.app_url + "/obs/metrics")
        lines = [line for line in text.splitlines() if 'path="/api/auth/login",status="200"' in line]
        return int(lines[0].split()[-1]) if lines else 0

    before = logins()
    login(lab)
    assert logins() == before + 1


def test_reload_takes_new_secrets_and_refuses_tokens_of_the_old(lab: Lab) -> None:
    path = lab.dir / "app" / "app.env"
    old, tokens = path.read_text(), login(lab)
    try:
        path.write_text(old.replace(lab.stolen["jwt_secret"], "f" * 64))
        assert me(lab.app_url, tokens["access_token"]) == 200  # a file alone changes nothing
        subprocess.run([lab.dir / "app" / "reload"], check=True)
        lab.until(lambda: proof(lab, "JWT_SECRET", "f" * 64), "the application does not reload", patience=3)
        assert me(lab.app_url, tokens["access_token"]) == 401
        assert me(lab.app_url, login(lab)["access_token"]) == 200
    finally:
        path.write_text(old)
        subprocess.run([lab.dir / "app" / "reload"], check=True)
    lab.until(lambda: proof(lab, "JWT_SECRET", lab.stolen["jwt_secret"]), "the application does not reload", patience=3)


def test_users_get_in_on_a_read_only_database(lab: Lab) -> None:
    with database(lab) as connection:
        try:
            connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            connection.execute("SELECT pg_reload_conf()")
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
            before = connection.execute("SELECT count(*) FROM sessions").fetchone()
            assert me(lab.app_url, login(lab)["access_token"]) == 200
            assert request("GET", lab.app_url + "/health")[0] == 200
            assert connection.execute("SELECT count(*) FROM sessions").fetchone() == before
        finally:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
            connection.execute("SELECT pg_reload_conf()")


def test_health_names_what_is_down_and_a_part_comes_back(lab: Lab) -> None:
    lab.stop("cache1")
    try:
        assert request("GET", lab.app_url + "/health") == (503, {"error": "sessions unavailable"})
        assert lab.state["parts"]["cache1"]["status"] == "down"
    finally:
        lab.start("cache1")
    assert request("GET", lab.app_url + "/health")[0] == 200
    with redis.Redis.from_url(lab.env["REDIS_URL"]) as cache:
        assert cache.hlen("flags:features") == 3
    lab.kill("pg2")
    lab.start("pg2")
    test_database_has_its_data_and_the_standby_follows(lab)


# The thief and the crowd, in a lab of their own beside the other


@pytest.fixture(scope="module")
def robbed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("robbed")
    process = start_lab(folder, "--thief")
    try:
        yield Lab(folder)
    finally:
        end_lab(process)


def doors(lab: Lab) -> dict[str, Any]:
    return dict(lab.thief.summary().get("doors", {}))


def test_two_labs_side_by_side(lab: Lab, robbed: Lab) -> None:
    assert lab.state["pid"] != robbed.state["pid"]
    assert not set(lab.secrets()) & set(robbed.secrets())
    assert me(robbed.app_url, login(lab)["access_token"]) == 401


def test_thief_is_off_unless_asked_for(lab: Lab) -> None:
    assert lab.state["parts"]["thief"]["status"] == "off" and not lab.thief.records()


def test_thief_steals_through_every_door(robbed: Lab) -> None:
    def through_all() -> bool:
        paths = [path for door in doors(robbed).values() for path in door["paths"].values()]
        return len(paths) == 8 and all(path["taken"] >= 3 for path in paths)

    robbed.until(through_all, "a door of the thief is closed from the start")
    assert set(doors(robbed)) == {"database", "tamper", "jwt", "refresh", "webhook"}
    with database(robbed) as connection:
        seen = connection.execute("SELECT note FROM users WHERE id = 13").fetchone()
        address = connection.execute(
            "SELECT host(client_addr) FROM pg_stat_activity WHERE usename = 'reporting' AND client_addr IS NOT NULL"
        ).fetchone()
    assert seen == ("seen by reporting",) and address == ("127.66.0.66",)


def test_blocking_at_the_edge_alone_closes_no_door(robbed: Lab) -> None:
    """A thief that is refused on one path goes on through the other: half closed is not closed."""
    app = Client(robbed.app_direct_url, "127.66.0.66")
    assert app.send("GET", "/health")[0] == 200
    assert not any(door["closed"] for door in doors(robbed).values())


def test_a_server_that_is_down_has_refused_nothing(robbed: Lab) -> None:
    robbed.stop("pg1")
    try:
        time.sleep(1)
        door = doors(robbed)["database"]
        assert door["paths"]["direct"]["unreachable"] >= 2
        assert not door["closed"] and door["paths"]["direct"]["refused"] == 0
    finally:
        robbed.start("pg1")


def test_doors_close_and_users_are_served(robbed: Lab) -> None:
    robbed.mark("start")
    with database(robbed) as connection:
        connection.execute("ALTER ROLE reporting NOLOGIN")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reporting'")
    path = robbed.dir / "app" / "app.env"
    text = path.read_text()
    for name in ("jwt_secret", "webhook_secret"):
        text = text.replace(robbed.stolen[name], secrets.token_hex(32))
    path.write_text(text)
    subprocess.run([robbed.dir / "app" / "reload"], check=True)
    with redis.Redis.from_url(robbed.env["REDIS_URL"]) as cache:
        for _unused in range(2):  # a token that was refreshed meanwhile has a new name
            for key in cache.scan_iter("session:refresh:*", count=1000):
                cache.delete(key)
    for name in doors(robbed):

        def closed(door: str = name) -> bool:
            return bool(doors(robbed)[door]["closed"])

        robbed.until(closed, f"the door {name} stays open")
    robbed.mark("end")
    seen = doors(robbed)
    for door in seen.values():
        assert door["taken_before"] > 0
        assert 0 <= door["closed_after_seconds"] < 10
        assert door["first_refused_at"] is not None

    def served() -> bool:
        return bool(robbed.crowd.summary()["phases"]["after"]["served"] >= 10)

    robbed.until(served, "users are not served after the response")
    phases = robbed.crowd.summary()["phases"]
    assert [phases[name]["refused"] for name in ("before", "during", "after")] == [0, 0, 0]
    assert phases["before"]["served"] > 0 and phases["during"]["signed_out"] + phases["after"]["signed_out"] > 0


def test_a_door_that_opens_again_is_seen(robbed: Lab) -> None:
    with database(robbed) as connection:
        connection.execute("ALTER ROLE reporting LOGIN")
    robbed.until(lambda: not doors(robbed)["database"]["closed"], "the thief does not try a closed door again")


def test_thief_stops_when_asked(robbed: Lab) -> None:
    robbed.thief.stop()
    count = len(robbed.thief.records())
    time.sleep(0.5)
    assert len(robbed.thief.records()) == count and robbed.thief.summary()["ended"]
    assert {record["outcome"] for record in robbed.thief.records()} <= {"taken", "refused", "unreachable"}


def test_asking_twice_starts_no_second_lab(robbed: Lab) -> None:
    env = {**os.environ, "LAB_DIR": str(robbed.dir)}
    done = subprocess.run(
        [sys.executable, "-m", "lab", "up"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "up already" in done.stdout
