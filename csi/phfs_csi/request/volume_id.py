"""Ids of provisioned volumes: `phfs://BUCKET/NAME?endpoint=URL&region=NAME&mac=HEX`. Pure.

An id says where the record of the volume is, and by its MAC what that record has to say before anything is deleted
(`phfs_csi.provision.id_keys`), so that neither an id nor a record that somebody made up names data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from phfs_csi.errors import InvalidArgument
from phfs_fuse.config import values
from phfs_fuse.config.model import StoreConfig

SCHEME: Final = "phfs"
NAME_BYTES_MAX: Final = 256
_KEYS: Final = ("endpoint", "region", "pathStyle", "mac")
_MAC: Final = re.compile("[0-9a-f]{64}|")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeId:
    bucket: str
    name: str  # that CreateVolume was called with
    endpoint: str = ""  # "": AWS, or that of the environment
    region: str = ""
    path_style: str = ""
    mac: str = ""  # "": of an older version, or without a key

    def __str__(self) -> str:
        given = {"endpoint": self.endpoint, "region": self.region, "pathStyle": self.path_style, "mac": self.mac}
        query = urlencode({key: text for key, text in given.items() if text}, safe=":/")
        return f"{SCHEME}://{self.bucket}/{quote(self.name, safe='')}" + (f"?{query}" if query else "")

    @property
    def store(self) -> StoreConfig:
        return StoreConfig(
            bucket=self.bucket,
            endpoint_url=self.endpoint or None,
            region=self.region or None,
            path_style=bool(values.boolean(self.path_style)) if self.path_style else None,
        )

    @property
    def attributes(self) -> Mapping[str, str]:
        """As volume attributes."""
        given = {"endpoint": self.endpoint, "region": self.region, "pathStyle": self.path_style}
        return {"bucket": self.bucket, **{key: text for key, text in given.items() if text}}


def parse_volume_id(text: str) -> VolumeId | None:
    """None: not one of a provisioned volume. Raises: InvalidArgument for one that nobody here has made."""
    if not text.startswith(f"{SCHEME}://"):
        return None
    try:
        found = _parsed(text)
        values.bucket(found.bucket)
        if found.endpoint and values.endpoint(found.endpoint) != found.endpoint:
            raise ValueError
        if found.path_style:
            values.boolean(found.path_style)
        if str(found) != text or not _MAC.fullmatch(found.mac) or not 0 < len(found.name.encode()) <= NAME_BYTES_MAX:
            raise ValueError
    except ValueError:
        raise InvalidArgument("volume_id: not one that this plugin has made") from None
    return found


def _parsed(text: str) -> VolumeId:
    parts = urlsplit(text)
    query = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    if set(query) - set(_KEYS):
        raise ValueError
    return VolumeId(
        bucket=parts.netloc,
        name=unquote(parts.path.removeprefix("/"), errors="strict"),
        endpoint=query.get("endpoint", ""),
        region=query.get("region", ""),
        path_style=query.get("pathStyle", ""),
        mac=query.get("mac", ""),
    )
