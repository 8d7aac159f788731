"""The containers of a pod as the manifests describe them, without a cluster: namespaces, mounts and rights by hand.

Each container is a process tree in a mount and a PID namespace of its own. Its root is this machine's, read-only,
with the volumes of the pod where the manifest puts them and with their propagation; host paths are below a folder
that stands for the root of a node. The network is this machine's. What the manifest does not give is not there, so
what runs here has what it needs.

Owns the processes and the folders of pod and node; nothing of them is left at the end of the `with` block.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phfs_fuse.host.mount_table import mount_table

SECONDS = 60.0
ROOT = Path(__file__).parents[2]
NAMESPACES = "unshare", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child"
Spec = Mapping[str, Any]


class Pod:
    """`secrets`: Secret name -> its content; `replaced`: argument -> what is given instead (ports)."""

    def __init__(self, node: Path, spec: Spec, secrets: Mapping[str, Mapping[str, str]], replaced: Mapping[str, str]):
        self.node = node
        self._spec, self._secrets, self._replaced = spec, secrets, replaced
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="phfs-pod-"))
        self._folder.chmod(0o755)

    def on_node(self, path: str | Path) -> Path:
        """A path as a container of the pod has it (of the kubelet's directory), as this process sees it."""
        return self.node / str(path).lstrip("/")

    def volume(self, name: str) -> Path:
        """Where an emptyDir or a Secret is."""
        return self._folder / f"volume-{name}"

    def start(self, name: str) -> None:
        """Start a container, also again."""
        [box] = (box for box in self._spec["containers"] if box["name"] == name)
        folder = self._folder / f"container-{name}"
        folder.mkdir(exist_ok=True)
        plan = {
            "work": str(folder),
            "mounts": self._mounts(box),
            "rights": self._rights(box),
            "command": self._command(box),
        }
        with (folder / "log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*NAMESPACES, sys.executable, "-m", "tests.csi.pod", json.dumps(plan)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ(box),
            )

    def kill(self, name: str) -> None:
        """kill -9 all processes of a container."""
        process = self._processes.pop(name)
        process.kill()  # the first process of the namespace dies with it, and the kernel kills the others
        process.wait(SECONDS)

    def keep_running(self) -> None:
        """Start again what has ended, as the kubelet does while the pod is not deleted."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                self.start(name)

    def delete(self, grace_seconds: float | None = None) -> list[str]:
        """End all containers as the kubelet does; returns those that had to be killed."""
        if grace_seconds is None:
            grace_seconds = self._spec.get("terminationGracePeriodSeconds", 30)
        for process in self._processes.values():
            _signal_first(process, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        killed = [name for name, process in self._processes.items() if process.poll() is None]
        self.end()
        return killed

    def log(self) -> str:
        logs = self._folder.glob("container-*/log")
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')}" for path in logs)

    def end(self) -> None:
        for name in list(self._processes):
            self.kill(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- the manifest

    def _mounts(self, box: Spec) -> list[tuple[str, str, str]]:
        """(source, place, how: "", "ro" or "Bidirectional") in order of places."""
        volumes = {volume["name"]: self._source(volume) for volume in self._spec["volumes"]}
        found = [
            (
                volumes[mount["name"]],
                mount["mountPath"],
                "ro" if mount.get("readOnly") else mount.get("mountPropagation", ""),
            )
            for mount in box["volumeMounts"]
        ]
        return sorted(found, key=lambda mount: mount[1])

    def _source(self, volume: Spec) -> str:
        if "hostPath" in volume:
            path = volume["hostPath"]["path"]
            if path.startswith("/dev/"):
                return str(path)
            source = self.on_node(path)
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                source.mkdir(parents=True, exist_ok=True)
            assert source.is_dir(), f"{path}: the kubelet would not start the pod"
            return str(source)
        if "secret" in volume:
            source = self.volume(volume["name"])
            source.mkdir(exist_ok=True)
            for key, text in self._secrets.get(volume["secret"]["secretName"], {}).items():
                (source / key).write_text(text)
                (source / key).chmod(volume["secret"]["defaultMode"])
                os.chown(source / key, 0, self._spec.get("securityContext", {}).get("fsGroup", 0))
            return str(source)
        assert volume["emptyDir"].keys() <= {"sizeLimit"}  # which is not held here
        source = self.volume(volume["name"])
        source.mkdir(exist_ok=True)
        source.chmod(0o777)
        return str(source)

    def _rights(self, box: Spec) -> list[str]:
        """The command that takes rights away, before the one of the container."""
        rights = box["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True
        if rights.get("privileged"):
            return []
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["allowPrivilegeEscalation"] is False
        command = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        user = {**self._spec.get("securityContext", {}), **rights}
        if user["runAsUser"]:
            command += [
                f"--reuid={user['runAsUser']}",
                f"--regid={user['runAsGroup']}",
                f"--groups={user['fsGroup']}",
            ]
        return command

    def _command(self, box: Spec) -> list[str]:
        """phfs-csi is that of this environment; tini is the image's, and left out where there is none."""
        assert box["command"] == ["tini", "--", "phfs-csi"]
        tini = [path, "--"] if (path := shutil.which("tini")) else []
        variables = self._environ(box)
        arguments = [self._replaced.get(word, word) for word in box["args"]]
        for name in variables.keys() & {item["name"] for item in box.get("env", ())}:
            arguments = [word.replace(f"$({name})", variables[name]) for word in arguments]
        return [*tini, sys.executable, "-m", "phfs_csi", *arguments]

    def _environ(self, box: Spec) -> dict[str, str]:
        downward = {"spec.nodeName": "node-1", "metadata.uid": f"uid-{self._folder.name}"}
        given = {
            item["name"]: item["value"] if "value" in item else downward[item["valueFrom"]["fieldRef"]["fieldPath"]]
            for item in box.get("env", ())
        }
        inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        return {**inherited, "AWS_EC2_METADATA_DISABLED": "true", **given}


def _signal_first(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the first process of a container, which unshare has started."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), number)


@contextmanager
def a_node() -> Iterator[Path]:
    """A folder that is the root of a node, a mount of its own that hands mounts on, with what the kubelet makes."""
    node = Path(tempfile.mkdtemp(prefix="phfs-node-"))
    subprocess.run(["mount", "--bind", node, node], check=True, timeout=SECONDS)
    try:
        subprocess.run(["mount", "--make-shared", node], check=True, timeout=SECONDS)
        for name in ("pods", "plugins_registry"):
            (node / "var/lib/kubelet" / name).mkdir(parents=True)
        yield node
    finally:
        for path in sorted((path for path in mount_table() if Path(path).is_relative_to(node)), reverse=True):
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(["umount", "-l", path], timeout=SECONDS, capture_output=True)
        shutil.rmtree(node, ignore_errors=True)


# --- within the namespaces of a container


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=SECONDS)


def _enter(plan: Spec) -> None:
    """Become the container's first process."""
    work = Path(plan["work"]) / "root"
    work.mkdir(exist_ok=True)
    below = subprocess.run(["findmnt", "-no", "TARGET", "--target", work], check=True, capture_output=True, text=True)
    _run("mount", "--make-private", below.stdout.strip())  # all that follows is seen here alone
    _run("mount", "-t", "tmpfs", "none", work)  # binds of a shared mount stay shared
    root, upper, scratch = (work / name for name in ("root", "upper", "scratch"))
    for path in (root, upper, scratch):
        path.mkdir()
    _run("mount", "-t", "overlay", "none", root, "-o", f"lowerdir=/,upperdir={upper},workdir={scratch}")
    _run("mount", "--rbind", "/dev", root / "dev")
    _run("mount", "--make-rprivate", root / "dev")
    _run("mount", "-t", "proc", "proc", root / "proc")
    for source, place, how in plan["mounts"]:
        _mount(source, root / place.lstrip("/"), how)
    for code in {str(ROOT), sys.prefix, sys.base_prefix}:  # in place of the image's; perhaps below a volume
        _mount(code, root / code.lstrip("/"), "")
        for parent in Path(code).parents[:-1]:
            (root / str(parent).lstrip("/")).chmod(0o755)  # the image's is open to all users
    _run("mount", "-o", "remount,ro", root)
    os.chroot(root)
    os.chdir("/")
    command = [*plan["rights"], *plan["command"]]
    os.execvp(command[0], command)


def _mount(source: str, place: Path, how: str) -> None:
    if not place.exists():
        place.mkdir(parents=True)
    _run("mount", "--rbind", source, place)
    if how != "Bidirectional":
        _run("mount", "--make-rprivate", place)
    if how == "ro":
        _run("mount", "-o", "remount,bind,ro", place)


if __name__ == "__main__":
    _enter(json.loads(sys.argv[1]))
