"""Where the volume of a claim is: the StorageClass's template, filled with the claim's words. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from phfs_csi.errors import InvalidArgument
from phfs_csi.request.attributes import has_controls

DEFAULT: Final = "volumes/${pv.name}"
METADATA: Final = "csi.storage.k8s.io/"
_WORD: Final = re.compile(r"\$\{([^}]*)\}")
_ANNOTATION: Final = re.compile(r"pvc\.annotations\['([^']+)'\]")

Annotations = Callable[[str, str], Mapping[str, str]]
"""(namespace, name) of a claim -> its annotations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What external-provisioner tells with --extra-create-metadata; `annotations` asks the cluster."""

    pv_name: str
    namespace: str = ""
    name: str = ""
    annotations: Annotations = field(default=lambda _namespace, _name: {})

    def word(self, name: str) -> str:
        """Raises: InvalidArgument for a word that there is not, or whose value cannot be one folder."""
        if found := _ANNOTATION.fullmatch(name):
            text = self.annotation(found[1])
        elif name in ("pv.name", "pvc.namespace", "pvc.name"):
            text = {"pv.name": self.pv_name, "pvc.namespace": self.namespace, "pvc.name": self.name}[name]
            self._need(text)
        else:
            known = "pv.name, pvc.namespace, pvc.name and pvc.annotations['KEY']"
            raise InvalidArgument(f"prefixTemplate: ${{{name[:80]}}} is not known, there are {known}")
        if text in (".", "..") or "/" in text or has_controls(text):
            raise InvalidArgument(f"prefixTemplate: the value of ${{{name[:80]}}} is no name of a folder")
        return text

    def annotation(self, key: str) -> str:
        """Raises: InvalidArgument when the claim has none of that name."""
        self._need(self.namespace and self.name)
        if not (text := self.annotations(self.namespace, self.name).get(key, "")):
            raise InvalidArgument(f"the claim {self.namespace}/{self.name} has no annotation {key!r}")
        return text

    @staticmethod
    def _need(text: str) -> None:
        if not text:
            raise InvalidArgument("the claim is not known: external-provisioner needs --extra-create-metadata")


def filled(template: str, claim: Claim) -> str:
    """Raises: InvalidArgument."""
    text = _WORD.sub(lambda found: claim.word(found[1]), template)
    if "$" in _WORD.sub("", template):
        raise InvalidArgument("prefixTemplate: a '$' that begins no ${...}")
    return text
