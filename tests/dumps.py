# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything that a lab's servers hold, read with their own clients and never through the collection."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import redis
from psycopg import sql

from lab.parts.services import request
from lab.thief import ADDRESS

ROTATED = ("JWT_SECRET", "WEBHOOK_SECRET")
SESSION = "session:refresh:"
PROBED = "21"  # the user who logs in when the doors are tried


def everything(lab: Any, *parts: str) -> dict[str, Any]:
    """What these parts of the lab hold; all of them where none is named."""
    return {name: read(lab) for name, read in PARTS.items() if not parts or name in parts}


def but_for_what_is_final(dump: dict[str, Any], before: dict[str, Any], everybody: bool = False) -> dict[str, Any]:
    """A dump without what tests/irreversible.yml allows to differ from ``before``; what may not is checked on the way."""
    affected = SESSION if everybody else tuple(f"{SESSION}{user}:" for user in (11, 12, 13))
    gone = [key for key in before["redis"] if key not in dump["redis"]]
    assert all(key.startswith(affected) for key in gone), gone
    new = [key for key in dump["redis"] if key not in before["redis"]]
    assert all(key.startswith(("firebreak:revocation:", f"{SESSION}{PROBED}:")) for key in new), new
    left = {key: value for key, value in dump["redis"].items() if key not in new}
    redis_part = {**{key: before["redis"][key] for key in gone}, **left}
    return {
        **dump,
        "redis": dict(sorted(redis_part.items())),
        "vault": _unrotated(dump["vault"]),
        "files": _undelivered(dump["files"]),
    }


def unprobed(dump: dict[str, Any]) -> dict[str, Any]:
    """Without the sessions that the doors' trial made."""
    probed = f"{SESSION}{PROBED}:"
    return {**dump, "redis": {key: value for key, value in dump["redis"].items() if not key.startswith(probed)}}


def _unrotated(dump: dict[str, Any]) -> dict[str, Any]:
    """Vault without the pending area, the rotated fields, and the versions and marks of the rotated key."""
    secrets = {}
    for path, secret in dump["secrets"].items():
        if path.startswith("secret/_pending/"):
            continue
        if path == "secret/app/backend":
            fields = {name: value for name, value in secret["data"].items() if name not in ROTATED}
            secret = {"data": fields, "metadata": {"max_versions": secret["metadata"]["max_versions"]}}
        secrets[path] = secret
    return {**dump, "secrets": secrets}


def _undelivered(dump: dict[str, Any]) -> dict[str, Any]:
    """The env file with the rotated values blanked; every other byte, mode and owner stays."""
    blank = {}
    for name, file in dump.items():
        pattern = rf"^({'|'.join(ROTATED)})=.*$"
        if "text" in file:
            file = {**file, "text": re.sub(pattern, r"\1=", file["text"], flags=re.MULTILINE)}
        blank[name] = file
    return blank


# --- PostgreSQL


def session(lab: Any, host: str = "pg1") -> psycopg.Connection[Any]:
    return psycopg.connect(
        host="127.0.0.1",
        port=lab.hostvars(host)["firebreak_postgresql_port"],
        dbname="divan",
        user="postgres",
        password=lab.env["PGPASSWORD"],
        autocommit=True,
    )


# Schemas that somebody made, not the server.
OURS = "nspname NOT LIKE 'pg\\_%' AND nspname <> 'information_schema'"


def postgresql(lab: Any) -> dict[str, Any]:
    """What pg_dumpall would write, as hashes where it is large, and the server's own configuration file."""
    queries = {
        "roles": "SELECT row_to_json(a)::jsonb - 'oid' FROM pg_authid a ORDER BY rolname",
        "members": "SELECT roleid::regrole::text, member::regrole::text FROM pg_auth_members ORDER BY 1, 2",
        "comments": "SELECT classoid::regclass::text, objoid::text, description FROM pg_shdescription ORDER BY 1, 2, 3",
        "labels": "SELECT classoid::regclass::text, objoid::text, label FROM pg_shseclabel ORDER BY 1, 2, 3",
        "role settings": "SELECT datname, rolname, setconfig FROM pg_db_role_setting LEFT JOIN pg_roles r ON r.oid = setrole"
        " LEFT JOIN pg_database d ON d.oid = setdatabase ORDER BY 1, 2",
        "databases": "SELECT datname, datallowconn, datconnlimit, datacl::text FROM pg_database ORDER BY 1",
        "settings": "SELECT name, reset_val, source FROM pg_settings WHERE source NOT IN ('client', 'session') ORDER BY 1",
        # ALTER SYSTEM writes the file anew: order and comments are the server's.
        "configuration": "SELECT DISTINCT ON (name) name, setting FROM pg_file_settings"
        " WHERE sourcefile LIKE '%/postgresql.auto.conf' ORDER BY name, seqno DESC",
        "schemas": f"SELECT nspname, nspacl::text FROM pg_namespace WHERE {OURS} ORDER BY 1",
        "relations": "SELECT nspname, relname, relkind::text, relacl::text, reloptions, relrowsecurity FROM pg_class"
        f" JOIN pg_namespace n ON n.oid = relnamespace WHERE {OURS} ORDER BY 1, 2",
        "columns": "SELECT attrelid::regclass::text, attname, atttypid::regtype::text, attnotnull, attacl::text"
        " FROM pg_attribute JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace"
        f" WHERE attnum > 0 AND {OURS} ORDER BY 1, attnum",
        "policies": "SELECT * FROM pg_policies ORDER BY schemaname, tablename, policyname",
        "functions": "SELECT nspname, proname, md5(prosrc), proacl::text FROM pg_proc JOIN pg_namespace n"
        f" ON n.oid = pronamespace WHERE {OURS} ORDER BY 1, 2, 3",
        "triggers": "SELECT tgrelid::regclass::text, tgname, tgenabled::text FROM pg_trigger ORDER BY 1, 2",
        "event triggers": "SELECT evtname, evtevent, evtenabled::text, obj_description(oid, 'pg_event_trigger')"
        " FROM pg_event_trigger ORDER BY 1",
        "sequences": "SELECT schemaname, sequencename, last_value FROM pg_sequences ORDER BY 1, 2",
    }
    with session(lab) as database:
        dump: dict[str, Any] = {name: database.execute(query).fetchall() for name, query in queries.items()}
        tables = [(schema, name) for schema, name, kind, *_unused in dump["relations"] if kind == "r"]
        dump["rows"] = {f"{schema}.{name}": _hash(database, schema, name) for schema, name in tables}
    dump["configuration"] = dict(dump["configuration"])
    facts = (Path(lab.dir) / "run" / "pg1" / "postgresql.auto.conf").stat()
    dump["configuration's mode"] = stat.filemode(facts.st_mode)
    return dict(json.loads(json.dumps(dump, default=str)))


def _hash(database: psycopg.Connection[Any], *table: str) -> list[Any]:
    query = sql.SQL("SELECT count(*), md5(coalesce(string_agg(t::text, ',' ORDER BY t::text), '')) FROM {} t")
    return list(database.execute(query.format(sql.Identifier(*table))).fetchone() or ())


def rows(lab: Any, table: str) -> int:
    with session(lab) as database:
        query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
        return int((database.execute(query).fetchone() or [0])[0])


# --- Valkey


def client(lab: Any) -> redis.Redis:
    known = lab.hostvars("cache1")
    return redis.Redis(port=known["firebreak_redis_port"], password=known["firebreak_redis_password"])


def keys(lab: Any) -> dict[str, Any]:
    """Each key with its bytes, and when it expires (a second more or less: it is told in milliseconds)."""
    with client(lab) as cache:
        names = sorted(cache.scan_iter(count=1000))
        asked = cache.pipeline(transaction=False)
        for name in names:
            asked.dump(name).pexpiretime(name)
        answers = asked.execute()
    return {
        name.decode(errors="surrogateescape"): [
            hashlib.sha256(answers[2 * place] or b"").hexdigest(),
            answers[2 * place + 1],
        ]
        for place, name in enumerate(names)
        if answers[2 * place] is not None
    }


def redis_server(lab: Any) -> dict[str, Any]:
    with client(lab) as cache:
        settings = cache.config_get("*")
        return {"acl": [str(line) for line in cache.acl_list()], "config": dict(sorted(settings.items()))}


# --- Vault


def vault(lab: Any) -> dict[str, Any]:
    """Every secret's data and metadata, and what stands around them."""
    paths = {path: _secret(lab, path) for path in sorted(_walk(lab, ""))}
    policies = ask_vault(lab, "LIST", "sys/policies/acl")["data"]["keys"]
    return {
        "secrets": {f"secret/{path}": secret for path, secret in paths.items()},
        "policies": {name: ask_vault(lab, "GET", f"sys/policies/acl/{name}")["data"]["policy"] for name in policies},
        "mounts": sorted(ask_vault(lab, "GET", "sys/mounts")["data"]),
        "auth": sorted(ask_vault(lab, "GET", "sys/auth")["data"]),
        "tokens": len(ask_vault(lab, "LIST", "auth/token/accessors")["data"]["keys"]),
    }


def _walk(lab: Any, folder: str) -> list[str]:
    found = []
    for name in (ask_vault(lab, "LIST", f"secret/metadata/{folder}").get("data") or {}).get("keys", []):
        found += _walk(lab, folder + name) if name.endswith("/") else [folder + name]
    return found


def _secret(lab: Any, path: str) -> dict[str, Any]:
    answer = ask_vault(lab, "GET", f"secret/data/{path}").get("data") or {}
    return {"data": answer.get("data"), "metadata": ask_vault(lab, "GET", f"secret/metadata/{path}")["data"]}


def ask_vault(lab: Any, method: str, path: str) -> dict[str, Any]:
    status, body = request(
        method, f"{lab.env['VAULT_ADDR']}/v1/{path}", headers={"X-Vault-Token": lab.env["VAULT_TOKEN"]}
    )
    assert status in (200, 204, 404), (path, status)
    return dict(body) if isinstance(body, dict) else {}


# --- the pool


def pool(lab: Any) -> dict[str, Any]:
    """Its file, and where it leads whose clients."""
    file = Path(lab.dir) / "run" / "pool1" / "pgbouncer.ini"
    known = lab.hostvars("pg1")
    with psycopg.connect(
        host="127.0.0.1",
        port=known["firebreak_pgbouncer_port"],
        user=known["firebreak_pgbouncer_user"],
        password=known["firebreak_pgbouncer_password"],
        dbname="pgbouncer",
        autocommit=True,
        cursor_factory=psycopg.ClientCursor,
    ) as console:
        rows = console.execute("SHOW DATABASES").fetchall()
    routes = {row[0]: [row[1], row[2], row[3], row[11], row[12]] for row in rows}
    return {"file": file.read_text(), "mode": stat.filemode(file.stat().st_mode), "routes": routes}


# --- the edge and the application's host


def edge(lab: Any) -> Any:
    """What everybody keeps at the edge, whoever it belongs to."""
    url = lab.env["LAB_CLOUDFLARE_URL"].removesuffix("/client/v4") + "/lab/dump"
    status, body = request("GET", url, headers={"Authorization": f"Bearer {lab.env['LAB_CLOUDFLARE_TOKEN']}"})
    assert status == 200
    return body


def application_files(lab: Any) -> dict[str, Any]:
    """The files beside the application, each with mode and owner."""
    found = {}
    for path in sorted((Path(lab.dir) / "app").iterdir()):
        facts = path.lstat()
        owner = [facts.st_uid, facts.st_gid]
        found[path.name] = {"mode": stat.filemode(facts.st_mode), "owner": owner}
        if path.is_symlink():
            found[path.name]["leads to"] = str(path.readlink())
        elif path.is_file():
            found[path.name]["text"] = path.read_bytes().decode(errors="surrogateescape")
    return found


# --- whether a system is contained, as it says itself


def fenced(lab: Any) -> bool:
    """Nobody writes, and the stolen role does not get in."""
    with session(lab) as database:
        fence = database.execute("SELECT current_setting('default_transaction_read_only')").fetchone()
        role = database.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = 'reporting'").fetchone()
    return fence == ("on",) and role == (False,)


def signed_out(lab: Any) -> bool:
    return not any(key.startswith(tuple(f"{SESSION}{user}:" for user in (11, 12, 13))) for key in keys(lab))


def shielded(lab: Any) -> bool:
    return request("GET", lab.app_url + "/health", source=ADDRESS)[0] == 403


def rotated(lab: Any) -> bool:
    """The stolen values are not the current ones any more."""
    data = ask_vault(lab, "GET", "secret/data/app/backend")["data"]["data"]
    stolen = {lab.stolen["jwt_secret"], lab.stolen["webhook_secret"]}
    return not stolen & {data[name] for name in ROTATED}


def retired(lab: Any) -> bool:
    """The stolen values are destroyed."""
    versions = ask_vault(lab, "GET", "secret/metadata/app/backend")["data"]["versions"]
    return rotated(lab) and versions["1"]["destroyed"]


def delivered(lab: Any) -> bool:
    text = (lab.dir / "app" / "app.env").read_text()
    return lab.stolen["jwt_secret"] not in text and lab.stolen["webhook_secret"] not in text


CONTAINED: dict[str, Callable[[Any], bool]] = {
    "pg1": fenced,
    "cache1": signed_out,
    "cf": shielded,
    "vault": retired,
    "app": delivered,
}


def contained(lab: Any) -> set[str]:
    return {host for host, holds in CONTAINED.items() if holds(lab)}


PARTS: dict[str, Callable[[Any], Any]] = {
    "postgresql": postgresql,
    "redis": keys,
    "redis server": redis_server,
    "vault": vault,
    "edge": edge,
    "files": application_files,
    "pool": pool,
}
