# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the running lab tells the world: `.lab/inventory.yml` for Ansible, `.lab/env` for a person's shell."""

from __future__ import annotations

import shlex
from typing import Any

from . import files
from .parts import AFFECTED_USERS, STAFF, Site, postgresql, services

RESPONDERS = "203.0.113.0/24"
THIEF = "198.51.100.66"
THIEF_SOURCE = "127.66.0.66"  # who the edge takes for that
USER = 20  # somebody whose things nobody stole
ROTATED = ["JWT_SECRET", "WEBHOOK_SECRET"]


def environment(site: Site) -> dict[str, str]:
    """The ecosystem's variables for the lab's administrator."""
    values = {
        "FIREBREAK_LAB": "1",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(site.port("pg1")),
        "PGUSER": "postgres",
        "PGPASSWORD": site.secrets["postgres"],
        "PGDATABASE": "divan",
        "REDIS_URL": f"redis://:{site.secrets['redis']}@127.0.0.1:{site.port('cache1')}/0",
        "LAB_APP_URL": services.app_url(site),
        "LAB_PSQL": f"{postgresql.tools_path()}/psql",
    }
    if "vault" in site.processes:
        values |= {"VAULT_ADDR": site.url("vault"), "VAULT_TOKEN": site.secrets["vault"]}
    if "s3" in site.processes:
        values |= {
            "AWS_ENDPOINT_URL": site.url("s3"),
            "AWS_ENDPOINT_URL_S3": site.url("s3"),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        values |= {"AWS_ACCESS_KEY_ID": site.secrets["s3_key"], "AWS_SECRET_ACCESS_KEY": site.secrets["s3_secret"]}
    if "cf" in site.processes:
        values |= {
            "LAB_CLOUDFLARE_URL": f"{site.url('cf')}/client/v4",
            "LAB_CLOUDFLARE_TOKEN": site.secrets["cloudflare"],
        }
    return values


def inventory(site: Site) -> dict[str, Any]:
    groups: dict[str, Any] = {
        "firebreak_cache": _hosts(cache1=_cache(site)),
        "firebreak_database": _hosts(pg1=_database(site, "pg1"), pg2=_database(site, "pg2")),
    }
    if "cf" in site.processes:
        groups["firebreak_edge"] = _hosts(cf=_edge(site))
    if "vault" in site.processes:
        groups["firebreak_secrets"] = _hosts(vault=_vault(site))
    if "ssh" in site.processes:
        groups["firebreak_services"] = _hosts(app=_application(site))
    known = {host for group in groups.values() for host in group["hosts"]}
    return {"all": {"vars": _common(site, known), "children": groups}}


def _hosts(**hosts: dict[str, Any]) -> dict[str, Any]:
    return {"hosts": hosts}


def _common(site: Site, known: set[str]) -> dict[str, Any]:
    values = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "firebreak_site": "lab",
        "firebreak_owner": "lab",
        "firebreak_case_store": f"file://{site.dir}/cases",
        "firebreak_affected": [host for host in ("cf", "cache1", "pg1", "vault", "app") if host in known],
        "firebreak_affected_users": list(AFFECTED_USERS),
        "firebreak_protected": _protected(site),
        "firebreak_evidence_patience": 5,
        "firebreak_block_addresses": [THIEF],
        "firebreak_stolen_roles": ["reporting"],
        "firebreak_application_roles": ["app"],
        "firebreak_application_url": services.app_url(site),
        "firebreak_application_direct_url": site.url("app"),
    }
    if "s3" in site.processes:
        values |= {
            "firebreak_case_access_key_id": site.secrets["s3_key"],
            "firebreak_case_secret_access_key": site.secrets["s3_secret"],
        }
    return values


def _protected(site: Site) -> dict[str, list[Any]]:
    return {
        "addresses": [RESPONDERS],
        "countries": [],
        "roles": ["postgres", "firebreak", "app", "repl", "pooler"],
        "accounts": [str(STAFF)],
        "tokens": ["root"],
        "keys": [site.secrets["s3_key"]],
    }


def _cache(site: Site) -> dict[str, Any]:
    return {
        "firebreak_redis_host": "127.0.0.1",
        "firebreak_redis_port": site.port("cache1"),
        "firebreak_redis_password": site.secrets["redis"],
        "firebreak_redis_db": 0,
    }


def _database(site: Site, name: str) -> dict[str, Any]:
    values = {
        "firebreak_postgresql_host": "127.0.0.1",
        "firebreak_postgresql_port": site.port(name),
        "firebreak_postgresql_user": "firebreak",
        "firebreak_postgresql_password": site.secrets["firebreak"],
        "firebreak_postgresql_database": "divan",
        "firebreak_postgresql_sslmode": "disable",
        "firebreak_database_role": "primary" if name == "pg1" else "standby",
    }
    return {**values, **_pool(site)} if name == "pg1" else values


def _pool(site: Site) -> dict[str, Any]:
    """The pool before it, and where its clients are led when nobody may write."""
    return {
        "firebreak_pgbouncer_host": "127.0.0.1",
        "firebreak_pgbouncer_port": site.port("pool1"),
        "firebreak_pgbouncer_user": "firebreak",
        "firebreak_pgbouncer_password": site.secrets["firebreak"],
        "firebreak_pgbouncer_sslmode": "disable",
        "firebreak_pgbouncer_routes": [{"database": "divan", "host": "127.0.0.1", "port": site.port("pg2")}],
    }


def _edge(site: Site) -> dict[str, Any]:
    return {
        "firebreak_cloudflare_url": f"{site.url('cf')}/client/v4",
        "firebreak_cloudflare_token": site.secrets["cloudflare"],
        "firebreak_cloudflare_account_id": site.cloudflare_account_id,
        "firebreak_cloudflare_zone_id": site.cloudflare_zone_id,
    }


def _vault_connection(site: Site) -> dict[str, Any]:
    return {"firebreak_vault_url": site.url("vault"), "firebreak_vault_token": site.secrets["vault"]}


def _vault(site: Site) -> dict[str, Any]:
    app = site.url("app")
    proof = [
        {"field": "JWT_SECRET", "kind": "jwt", "url": f"{app}/api/me", "claims": {"sub": "1"}},
        {"field": "WEBHOOK_SECRET", "kind": "webhook", "url": f"{app}/hooks/payment"},
    ]
    rotated = [{"mount": "secret", "path": services.APP_KEY, "fields": list(ROTATED), "proof": proof}]
    return {**_vault_connection(site), "firebreak_secrets_rotated": rotated}


def _application(site: Site) -> dict[str, Any]:
    folder = site.run / "ssh"
    options = {"UserKnownHostsFile": folder / "known_hosts", "StrictHostKeyChecking": "yes", "IdentitiesOnly": "yes"}
    words = ["-F", "/dev/null", *(f"-o {name}={shlex.quote(str(value))}" for name, value in options.items())]
    delivered = {
        "mount": "secret",
        "path": services.APP_KEY,
        "fields": {name: name for name in ROTATED},
        "env_file": str(site.app_dir / "app.env"),
        "reload": [str(site.app_dir / "reload")],
        "proof_url": f"{site.url('app')}/internal/secret-proof",
    }
    values = {
        "ansible_connection": "ssh",
        "ansible_host": "127.0.0.1",
        "ansible_port": site.port("ssh"),
        "ansible_user": "lab",
        "ansible_ssh_private_key_file": str(folder / "client"),
        "ansible_ssh_common_args": " ".join(words),
        "ansible_remote_tmp": str(folder / "tmp"),  # the system knows no user `lab`, so no ~lab
        "firebreak_health_url": f"{services.app_url(site)}/health",
        "firebreak_secrets_delivered": [delivered],
        "firebreak_verify_checks": _checks(site),
    }
    return values | (_vault_connection(site) if "vault" in site.processes else {})


def _checks(site: Site) -> list[dict[str, Any]]:
    """What must hold once it is contained: users get in, the thief's address does not, and the numbers go on."""
    url = services.app_url(site)
    person = {name: site.people[USER][name] for name in ("email", "password")}
    checks: list[dict[str, Any]] = [
        {
            "name": "users log in",
            "url": f"{url}/api/auth/login",
            "method": "POST",
            "body": person,
            "expect": {"present": ["access_token", "refresh_token"]},
            "then": {"url": f"{url}/api/me"},
            "source_address": "127.0.2.21",
        },
        {"name": "metrics", "url": f"{url}/obs/metrics", "expect": {"contains": "divan_http_requests_total"}},
    ]
    if "cf" in site.processes:
        thief = {"name": "thief at the edge", "url": f"{url}/health", "must": "refuse", "expect_status": [403]}
        checks.append({**thief, "source_address": THIEF_SOURCE})
    return checks


def write(site: Site) -> None:
    import yaml

    text = yaml.safe_dump(inventory(site), sort_keys=False, width=1000)
    files.write(site.dir / "inventory.yml", f"# The running lab; written anew at each start.\n---\n{text}")
    lines = (f"export {name}={shlex.quote(value)}\n" for name, value in environment(site).items())
    files.write(site.dir / "env", "".join(lines))
