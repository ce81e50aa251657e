# Copyright: The firebreak.incident contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change in any release.
"""AWS through boto3: the S3 client of the case store."""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import urllib.parse
from typing import Any

from ._control import Context
from ._deps import require
from ._errors import Refused, StoreUnavailable

_session: Any = None
CONNECT_SECONDS = 3
# The codes that help whoever reads a message; any other one is the server's own text.
CODES = frozenset(
    [
        *("AccessDenied", "AuthorizationHeaderMalformed", "ConditionalRequestConflict", "ExpiredToken"),
        *("InternalError", "InvalidAccessKeyId", "InvalidArgument", "InvalidBucketName", "InvalidRequest"),
        *("InvalidToken", "MethodNotAllowed", "NoSuchBucket", "NoSuchKey", "NotImplemented", "OperationAborted"),
        *("PermanentRedirect", "PreconditionFailed", "RequestTimeTooSkewed", "RequestTimeout", "ServiceUnavailable"),
        *("SignatureDoesNotMatch", "SlowDown", "TemporaryRedirect", "Throttling"),
    ]
)
READ_SECONDS = 5

SPEC: dict[str, Any] = {
    "case_access_key_id": {"type": "str", "no_log": False},
    "case_secret_access_key": {"type": "str", "no_log": True},
}


def preload() -> None:
    """Import boto3 and read its S3 model once; an unused client warms the loader and opens no connection."""
    global _session
    if _session is None:
        boto3 = require("boto3", "boto3", "1.35.0")
        session = boto3.session.Session()
        session.client(
            "s3",
            region_name="us-east-1",
            aws_access_key_id="unused",
            aws_secret_access_key="unused",
            endpoint_url="http://127.0.0.1:9",
        )
        _session = session


@dataclasses.dataclass(frozen=True)
class S3Place:
    """A parsed ``s3://`` address. Mode and days of Object Lock have no default: they decide what can ever be deleted."""

    bucket: str
    prefix: str
    region: str
    endpoint: str | None
    lock_mode: str
    retention_days: int

    @classmethod
    def parse(cls, uri: str) -> S3Place:
        parts = urllib.parse.urlsplit(uri)
        query = {key: values[-1] for key, values in urllib.parse.parse_qs(parts.query).items()}
        unknown = sorted(set(query) - {"region", "endpoint", "lock_mode", "retention_days"})
        if unknown:
            raise Refused(
                f"case_store: unknown parameter {', '.join(unknown)}; known are region, endpoint, lock_mode, retention_days"
            )
        mode, days = query.get("lock_mode", ""), query.get("retention_days", "")
        if mode not in ("GOVERNANCE", "COMPLIANCE"):
            raise Refused("case_store: add lock_mode=GOVERNANCE or lock_mode=COMPLIANCE; it has no default")
        if not days.isdigit() or int(days) < 1:
            raise Refused("case_store: add retention_days=, a whole number of days; it has no default")
        return cls(
            bucket=parts.netloc,
            prefix=parts.path.strip("/"),
            region=query.get("region", "us-east-1"),
            endpoint=query.get("endpoint"),
            lock_mode=mode,
            retention_days=int(days),
        )

    def lock(self, now: float) -> dict[str, Any]:
        until = datetime.datetime.fromtimestamp(now, datetime.UTC) + datetime.timedelta(days=self.retention_days)
        return {"ObjectLockMode": self.lock_mode, "ObjectLockRetainUntilDate": until}


class Answer(Exception):
    """An answer of the service that is not a success: its status and code, never its text."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code

    def text(self, action: str) -> str:
        if self.code == "RequestTimeTooSkewed":
            return f"cannot {action}: this machine's clock is not S3's ({self.code}); set it right and try again"
        remedy = {
            401: "check case_access_key_id and case_secret_access_key",
            403: "check case_access_key_id, case_secret_access_key and the bucket's policy",
            404: "check the bucket's name in case_store",
        }.get(self.status, "try again")
        return f"cannot {action}: S3 answered {self.status} {self.code}; {remedy}"


def s3_client(place: S3Place, params: dict[str, Any], context: Context) -> Any:
    """A client for one place, with credentials from the options, else from the task's environment."""
    preload()
    config = require("botocore.config", "botocore", "1.35.0").Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": 2, "mode": "standard"},
        max_pool_connections=32,
        s3={"addressing_style": "path"} if place.endpoint else {},
    )
    key = params.get("case_access_key_id") or context.env.get("AWS_ACCESS_KEY_ID")
    secret = context.secret(params.get("case_secret_access_key") or context.env.get("AWS_SECRET_ACCESS_KEY"))
    token = context.secret(context.env.get("AWS_SESSION_TOKEN"))
    if bool(key) != bool(secret):
        raise Refused("case_store: give case_access_key_id and case_secret_access_key together")
    if not key and params.get("site") == "lab":
        raise Refused("case_store: on the lab give case_access_key_id and case_secret_access_key")
    client = _session.client(
        "s3",
        region_name=place.region,
        endpoint_url=place.endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        aws_session_token=token,
        config=config,
    )
    # "Expect: 100-continue" doubles the time of a small put.
    client.meta.events.register("before-send.s3.PutObject", _without_expect)
    return client


def _without_expect(request: Any, **_kwargs: Any) -> None:
    if "Expect" in request.headers:
        del request.headers["Expect"]


def call(client: Any, operation: str, **arguments: Any) -> dict[str, Any]:
    """One call; an answer that is no success becomes ``Answer``, no answer becomes ``StoreUnavailable``."""
    exceptions = require("botocore.exceptions", "botocore", "1.35.0")
    try:
        answer: dict[str, Any] = getattr(client, operation)(**arguments)
        if "Body" in answer:
            answer["Body"] = answer["Body"].read()
        return answer
    except exceptions.ClientError as exc:
        status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code = str(exc.response.get("Error", {}).get("Code", "unknown"))
        raise Answer(status, code if code in CODES else "with another error") from None
    except exceptions.NoCredentialsError:
        raise StoreUnavailable(
            "case_store: no credentials; set case_access_key_id and case_secret_access_key"
        ) from None
    except (exceptions.BotoCoreError, OSError) as exc:
        raise StoreUnavailable(
            f"case_store: S3 cannot be reached ({type(exc).__name__}); check endpoint and network"
        ) from None


def server_time(answer: dict[str, Any]) -> float | None:
    """The service's own time, from the answer's Date header (whole seconds)."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return email.utils.parsedate_to_datetime(date).timestamp() if date else None
