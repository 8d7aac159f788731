"""Credentials of one mount that change while it runs. Owns the credentials file."""

from __future__ import annotations

import os
from pathlib import Path

import boto3

from tests.support.servers import Server

LIFE_SECONDS = 7 * 24 * 3600
FILE = "[default]\naws_access_key_id = {AccessKeyId}\naws_secret_access_key = {SecretAccessKey}\n"
FILE += "aws_session_token = {SessionToken}\n"


class Keys:
    def __init__(self, server: Server, path: Path) -> None:
        self._sts = boto3.client(
            "sts",
            endpoint_url=server.endpoint_url,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
        )
        self._path = path
        self._key = ""
        self.renew()

    def renew(self) -> str:
        """Put others in the place of the credentials; the access key of the former."""
        answer = self._sts.assume_role(
            RoleArn="arn:aws:iam::123456789012:role/torture", RoleSessionName="torture", DurationSeconds=LIFE_SECONDS
        )
        beside = self._path.with_suffix(".new")
        beside.touch(mode=0o600)
        beside.write_text(FILE.format(**answer["Credentials"]))
        os.replace(beside, self._path)
        old, self._key = self._key, answer["Credentials"]["AccessKeyId"]
        return old
