# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A case store in the lab's S3, seen with a client of our own."""

from __future__ import annotations

import json
from typing import Any

import boto3

from lab.client import Lab

BUCKET = "cases"


class Bucket:
    def __init__(self, lab: Lab, prefix: str) -> None:
        endpoint = lab.env["AWS_ENDPOINT_URL_S3"]
        self.uri = f"s3://{BUCKET}/{prefix}?endpoint={endpoint}&lock_mode=GOVERNANCE&retention_days=1"
        self.prefix = prefix
        # The options of a task that is not in the lab's inventory.
        self.options = {
            "case_store": self.uri,
            "case_access_key_id": lab.env["AWS_ACCESS_KEY_ID"],
            "case_secret_access_key": lab.env["AWS_SECRET_ACCESS_KEY"],
        }
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=lab.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=lab.env["AWS_SECRET_ACCESS_KEY"],
        )

    def keys(self, *words: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key for key in found if all(word in key for word in words)]

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def put(self, key: str, data: bytes) -> None:
        """A new version, over what stands there."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def hide(self, key: str) -> None:
        """A delete marker."""
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def destroy(self, key: str) -> None:
        """Every version of it, as who may bypass the lock can."""
        page = self.client.list_object_versions(Bucket=BUCKET, Prefix=key)
        for version in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
            self.client.delete_object(
                Bucket=BUCKET, Key=key, VersionId=version["VersionId"], BypassGovernanceRetention=True
            )

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(self.get(key)) for key in self.keys("/journal/")]
