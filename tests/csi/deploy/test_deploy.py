"""The manifests: valid for Kubernetes, true to the plugin's flags and attributes, and no more rights than needed.

Nothing is applied anywhere: charts are rendered and compared with the API's schemas and with the code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is in the extra `test`")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="it is in the extra `test`")

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "csi" / "deploy"
CHART = DEPLOY / "chart"
BASE = DEPLOY / "base" / "phfs-csi.yaml"
EXAMPLES = sorted(
    path for path in (DEPLOY / "examples").rglob("*.yaml") if path.name not in ("values.yaml", "kustomization.yaml")
)
OLDEST = "1.25"  # as Chart.yaml says; the newest is what the package of schemas has
OURS = "plugin", "holder"  # containers of our own image
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", re.IGNORECASE)
MARK = re.compile(r"CHANGE-ME")

Object = Mapping[str, Any]

# Values of the chart -> what an administrator would give; every switch at least once.
VARIANTS: Mapping[str, Sequence[str]] = {
    "default": (),
    "csi-rclone": ("--values", str(DEPLOY / "examples" / "csi-rclone" / "values.yaml")),
    "registrar": ("--set", "node.registrar.enabled=true"),
    "microk8s": ("--set", "kubeletDir=/var/snap/microk8s/common/var/lib/kubelet"),
    "no secret": ("--set", "storeSecret=", "--set", "storageClass.default=true"),
    "no inline": ("--set", "inline.enabled=false,idKeys.secret=,inline.endpoints=null"),
    "all": (
        *("--set", "imagePullSecrets[0].name=pull,node.podAnnotations.a=b,controller.podAnnotations.a=b"),
        *("--set", "node.serviceAccountAnnotations.a=b,controller.serviceAccountAnnotations.a=b"),
        *("--set", "node.nodeSelector.pool=gpu,controller.nodeSelector.pool=system,controller.replicas=2"),
        *("--set", "node.env[0].name=AWS_ENDPOINT_URL,node.env[0].value=http://minio.hub:9000"),
        *("--set", "controller.env[0].name=AWS_ENDPOINT_URL,controller.env[0].value=http://minio.hub:9000"),
        *("--set", "node.envFrom[0].secretRef.name=more,controller.envFrom[0].secretRef.name=more"),
        *("--set", "controller.tolerations[0].operator=Exists,storageClass.mountOptions[0]=attr-ttl=1s"),
        *("--set-json", 'node.affinity={"nodeAffinity":{}}', "--set-json", 'controller.affinity={"podAffinity":{}}'),
        *("--set", "image.repository=example.org/phfs,image.tag=1.2.3,node.stateDir=/data/a,node.cacheDir=/data/b"),
    ),
}


# --- rendering


def tool(name: str) -> str:
    """A program that `./dev test` builds, or that is installed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phfs-tests" / "bin"
    found = shutil.which(name, path=f"{folder}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"no {name}: ./dev test builds it where there is go")


@cache
def chart(*flags: str, release: str = "phfs-csi") -> tuple[Object, ...]:
    command = [tool("helm"), "template", release, str(CHART), "--namespace", release, "--kube-version", "1.30.0"]
    return tuple(objects(subprocess.run([*command, *flags], check=True, capture_output=True, text=True).stdout))


@cache
def kustomized(folder: Path) -> tuple[Object, ...]:
    done = subprocess.run([tool("kustomize"), "build", str(folder)], check=True, capture_output=True, text=True)
    return tuple(objects(done.stdout))


def objects(text: str) -> Iterator[Object]:
    return (found for found in yaml.safe_load_all(text) if found)


def base() -> tuple[Object, ...]:
    return tuple(objects(BASE.read_text()))


def example(path: Path) -> tuple[Object, ...]:
    return tuple(objects(path.read_text()))


def named(found: Sequence[Object]) -> dict[tuple[str, str, str], Object]:
    keys = [(thing["kind"], thing["metadata"].get("namespace", ""), thing["metadata"]["name"]) for thing in found]
    assert len(keys) == len(set(keys))
    return dict(zip(keys, found, strict=True))


def of_kind(found: Sequence[Object], kind: str) -> list[Object]:
    return [thing for thing in found if thing["kind"] == kind]


def pods(found: Sequence[Object]) -> Iterator[Object]:
    """The spec of every pod, also of those in templates."""
    for thing in found:
        if thing["kind"] == "Pod":
            yield thing["spec"]
        elif "template" in thing.get("spec", {}):
            yield thing["spec"]["template"]["spec"]


def containers(found: Sequence[Object]) -> Iterator[Object]:
    for pod in pods(found):
        yield from pod.get("initContainers", ())
        yield from pod["containers"]


def daemon(found: Sequence[Object]) -> Object:
    [pod] = pods(of_kind(found, "DaemonSet"))
    return pod


def everything() -> Iterator[tuple[str, tuple[Object, ...]]]:
    """Base, examples and the benchmark: what needs no program to be read."""
    yield "base", base()
    yield "bench-job.yaml", example(DEPLOY / "bench-job.yaml")
    for path in EXAMPLES:
        yield str(path.relative_to(DEPLOY)), example(path)


SETS = dict(everything())
IMAGES = {box["image"] for box in containers(base()) if box["name"] in OURS}


# --- the ways to install give the same


def test_the_base_is_what_the_chart_gives(tmp_path: Path) -> None:
    tool("helm")
    made = tmp_path / "made.yaml"
    subprocess.run([DEPLOY / "render", made], check=True)
    assert made.read_text() == BASE.read_text(), "run csi/deploy/render"


def test_the_base_adds_its_namespace_to_the_chart_and_nothing_else() -> None:
    ours, charts = named(base()), named(chart())
    assert ours.pop(("Namespace", "", "phfs-csi"))
    assert ours == charts


def test_kustomize_builds_the_base() -> None:
    assert named(kustomized(BASE.parent)) == named(base())


def test_two_releases_share_no_object() -> None:
    """One for each driver name, in one cluster."""
    ours = named(chart()).keys()
    assert not ours & named(chart(*VARIANTS["csi-rclone"], release="phfs-csi-rclone")).keys()


def host_paths(found: Sequence[Object]) -> dict[str, str]:
    return {volume["name"]: volume["hostPath"]["path"] for volume in daemon(found)["volumes"] if "hostPath" in volume}


def test_two_releases_share_no_directory_of_a_node() -> None:
    ours, others = host_paths(base()), host_paths(chart(*VARIANTS["csi-rclone"], release="phfs-csi-rclone"))
    same = {name for name in ours if ours[name] == others[name]}
    assert same == {"fuse", "pods", "registration", "staging"}  # of the node and its kubelet


def test_nothing_keeps_the_kubelet_directory_of_others() -> None:
    assert "/var/lib/kubelet" not in json.dumps(chart("--set", "kubeletDir=/opt/kubelet"))


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert meta["version"] == meta["appVersion"] == project
    assert {f"phfs:{project}"} == IMAGES


@pytest.mark.parametrize(
    "wrong",
    [
        "nodes=1",
        "node.cacheSize=lots",
        "kubeletDir=kubelet",
        "kubeletDir=/var/lib/../etc",
        "driverName=Not A Name",
        "node.logLevel=chatty",
        "node.env[0].name=AWS_SECRET_ACCESS_KEY,node.env[0].value=literal",
        "storageClass.reclaimPolicy=Recycle",
    ],
)
def test_wrong_values_are_refused(wrong: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        chart("--set", wrong)
    assert "values don't meet the specifications" in failed.value.stderr


# --- the schemas of the API


def check_schemas(found: Sequence[Object]) -> None:
    for thing in found:
        check_schema(json.dumps(thing))


@cache
def check_schema(text: str) -> None:
    for version in (OLDEST, kubernetes_validate.latest_version()):
        kubernetes_validate.validate(json.loads(text), version, strict=True)


def test_the_schemas_find_a_wrong_word() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schemas([{**of_kind(base(), "CSIDriver")[0], "specs": {}}])


@pytest.mark.parametrize("name", SETS)
def test_files_keep_to_the_schemas(name: str) -> None:
    check_schemas(SETS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_chart_keeps_to_the_schemas(name: str) -> None:
    check_schemas(chart(*VARIANTS[name]))


def test_the_whole_store_of_primehub_keeps_to_the_schemas() -> None:
    found = kustomized(DEPLOY / "examples" / "primehub-store")
    check_schemas(found)
    named(found)
    lost = [thing for thing in found if thing["kind"] not in ("PersistentVolume", "Namespace")]
    assert {thing["metadata"].get("namespace") for thing in lost} == {"hub"}


def test_the_overlay_changes_what_it_says() -> None:
    found = kustomized(DEPLOY / "examples" / "overlay")
    check_schemas(found)
    ours = {box["image"] for box in containers(found) if box["name"] in OURS}
    assert ours == {image.replace("phfs", "registry.example.org/phfs") for image in IMAGES}
    [storage] = of_kind(found, "StorageClass")
    assert storage["parameters"]["endpoint"] == "https://minio.example.org"


# --- pods


def sets_with_variants() -> list[str]:
    return [*SETS, *(f"chart: {name}" for name in VARIANTS)]


def one_set(name: str) -> tuple[Object, ...]:
    kind, _, variant = name.partition(": ")
    return chart(*VARIANTS[variant]) if kind == "chart" else SETS[name]


@pytest.mark.parametrize("name", sets_with_variants())
def test_every_mount_has_its_volume_and_every_volume_a_mount(name: str) -> None:
    for pod in pods(one_set(name)):
        mounted = {mount["name"] for box in pod["containers"] for mount in box.get("volumeMounts", ())}
        there = {volume["name"] for volume in pod.get("volumes", ())}
        if name in SETS and any(thing["kind"] == "StatefulSet" for thing in SETS[name]):
            there |= {"export"}  # of its volumeClaimTemplates
        assert mounted == there


@pytest.mark.parametrize("name", sets_with_variants())
def test_no_secret_is_written_where_everybody_reads_it(name: str) -> None:
    for box in containers(one_set(name)):
        words = [*box.get("command", ()), *box.get("args", ())]
        assert not any(MARK.search(word) for word in words)
        assert {word.partition("=")[0] for word in words if word[0] == "-" and SECRET_NAME.search(word)} <= {
            "--secrets-dir"
        }
        literal = [
            item["name"] for item in box.get("env", ()) if SECRET_NAME.search(item["name"]) and "value" in item
        ]
        assert literal == []


def test_examples_have_no_real_credentials() -> None:
    for name, found in SETS.items():
        for secret in of_kind(found, "Secret"):
            keys = {key: text for key, text in secret["stringData"].items() if key != "endpoint"}
            assert all(MARK.match(text) for text in keys.values()), name


@pytest.mark.parametrize("name", [f"chart: {name}" for name in VARIANTS])
def test_no_port_or_network_of_the_node_is_taken(name: str) -> None:
    """During an upgrade two pods run on each node."""
    for pod in pods(one_set(name)):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        ports = [port for box in pod["containers"] for port in box.get("ports", ())]
        assert not any("hostPort" in port for port in ports)
        assert len({port["containerPort"] for port in ports}) == len(ports)


@pytest.mark.parametrize("name", [f"chart: {name}" for name in VARIANTS])
def test_only_the_plugin_of_the_node_is_privileged(name: str) -> None:
    for box in containers(one_set(name)):
        rights = box["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True
        if box["name"] == "plugin" and rights.get("privileged"):
            assert any(mount.get("mountPropagation") == "Bidirectional" for mount in box["volumeMounts"])
            continue
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert not any("mountPropagation" in mount for mount in box["volumeMounts"])


@pytest.mark.parametrize("name", [f"chart: {name}" for name in VARIANTS])
def test_plugins_have_probes_and_all_have_resources(name: str) -> None:
    for box in containers(one_set(name)):
        assert "requests" in box["resources"]
        assert "memory" in box["resources"]["limits"]
        ports = {port["name"] for port in box.get("ports", ())}
        probes = [box[kind] for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in box]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports
        assert len(probes) == {"plugin": 3, "holder": 0}.get(box["name"], 1)


def test_a_registrar_whose_socket_is_gone_is_soon_started_again() -> None:
    """The one of the old pod removes whatever is at the path, and nothing puts it back."""
    [registrar] = (box for box in daemon(chart(*VARIANTS["registrar"]))["containers"] if box["name"] == "registrar")
    probe = registrar["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= 10


def test_the_holder_sees_no_directory_in_which_a_mount_may_appear() -> None:
    """Its mount namespace would keep that mount for ever."""
    plugin, holder = (box for box in daemon(base())["containers"] if box["name"] in OURS)
    assert [mount["name"] for mount in holder["volumeMounts"]] == ["sockets"]
    shared = {mount["name"] for mount in plugin["volumeMounts"] if mount.get("mountPropagation")}
    paths = host_paths(base())
    assert shared == {"pods", "staging"}
    assert not any(paths[name].startswith(paths["sockets"]) for name in shared)


def test_the_kubelet_s_paths_are_the_same_inside() -> None:
    [plugin] = (box for box in daemon(base())["containers"] if box["name"] == "plugin")
    inside = {mount["name"]: mount["mountPath"] for mount in plugin["volumeMounts"]}
    outside = host_paths(base())
    assert [inside[name] for name in ("pods", "staging")] == [outside[name] for name in ("pods", "staging")]


# --- rights


def test_the_node_has_no_right_at_the_api_server() -> None:
    assert daemon(base())["automountServiceAccountToken"] is False
    bound = {who["name"] for kind in ("ClusterRoleBinding", "RoleBinding") for thing in of_kind(base(), kind)
             for who in thing["subjects"]}  # fmt: skip
    assert bound == {"phfs-csi-controller"}


def test_no_secret_is_open_and_leases_by_name_alone() -> None:
    [cluster], [local] = of_kind(base(), "ClusterRole"), of_kind(base(), "Role")
    assert "leases" not in {name for rule in cluster["rules"] for name in rule["resources"]}
    everywhere = [*cluster["rules"], *local["rules"]]
    assert not {"*", "secrets"} & {word for rule in everywhere for word in (*rule["verbs"], *rule["resources"])}
    open_rules = [rule for rule in local["rules"] if "resourceNames" not in rule]
    assert open_rules == [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]}]


def node_flags(found: Sequence[Object]) -> set[str]:
    return {flag for box in daemon(found)["containers"] if box["name"] == "plugin" for flag in box["args"]}


def test_inline_volumes_use_the_store_of_the_plugin_and_can_be_turned_off() -> None:
    assert {"--inline-endpoints=store", "--inline-max=64"} <= node_flags(base())
    [driver] = of_kind(base(), "CSIDriver")
    assert driver["spec"]["volumeLifecycleModes"] == ["Persistent", "Ephemeral"]
    without = chart(*VARIANTS["no inline"])
    assert "--inline-max=0" in node_flags(without)
    [driver] = of_kind(without, "CSIDriver")
    assert driver["spec"]["volumeLifecycleModes"] == ["Persistent"]


def test_a_digest_takes_the_place_of_the_tag() -> None:
    digest = "sha256:" + "0" * 64
    found = chart("--set", f"image.repository=example.org/phfs,image.digest={digest}")
    assert {box["image"] for box in containers(found) if box["name"] in OURS} == {f"example.org/phfs@{digest}"}


def test_others_reach_the_metrics_alone() -> None:
    [policy] = of_kind(base(), "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    [rule] = policy["spec"]["ingress"]
    assert rule == {"ports": [{"port": 9808, "endPort": 9811}]}
    [limited] = of_kind(chart("--set-json", 'networkPolicy.egress=[{"ports":[{"port":9000}]}]'), "NetworkPolicy")
    assert limited["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert of_kind(chart("--set", "networkPolicy.create=false"), "NetworkPolicy") == []


def test_every_directory_in_memory_or_on_the_node_s_disk_has_a_limit() -> None:
    volumes = [volume for pod in pods(base()) for volume in pod["volumes"] if "emptyDir" in volume]
    assert volumes
    assert all("sizeLimit" in volume["emptyDir"] for volume in volumes)


def test_leases_are_named_as_the_sidecars_name_them() -> None:
    """Source: csi-lib-utils, leaderelection: all but letters, digits and dashes becomes a dash."""
    [driver] = of_kind(base(), "CSIDriver")
    lease = re.sub(r"[^a-zA-Z0-9-]", "-", driver["metadata"]["name"])
    [names] = [rule["resourceNames"] for role in of_kind(base(), "Role") for rule in role["rules"]
               if rule["resources"] == ["leases"] and "resourceNames" in rule]  # fmt: skip
    assert names == [lease, f"external-resizer-{lease}"]


# --- the plugin's own words


def plugin_help(role: str) -> str:
    pytest.importorskip("phfs_csi.rpc.server", reason="the plugin is not in this checkout")
    command = [sys.executable, "-m", "phfs_csi", role, "--help"]
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=env).stdout


@pytest.mark.parametrize("name", VARIANTS)
def test_the_plugin_knows_every_flag(name: str) -> None:
    for box in containers(chart(*VARIANTS[name])):
        if box["name"] not in OURS:
            continue
        assert box["command"] == ["tini", "--", "phfs-csi"]
        role, *flags = box["args"]
        known = set(re.findall(r"--[a-z][a-z-]+", plugin_help(role)))
        assert {flag.partition("=")[0] for flag in flags} <= known


def volumes_of(found: Sequence[Object]) -> Iterator[tuple[str, Object, Sequence[str], Object]]:
    """Handle, attributes, mount options and the content of the Secret of every volume in `found`."""
    secrets = {secret["metadata"]["name"]: secret["stringData"] for secret in of_kind(found, "Secret")}
    for volume in of_kind(found, "PersistentVolume"):
        spec = volume["spec"]["csi"]
        secret = secrets.get(spec.get("nodeStageSecretRef", {}).get("name"), {})
        yield spec["volumeHandle"], spec["volumeAttributes"], volume["spec"].get("mountOptions", ()), secret
    for pod in pods(found):
        for spec in (volume["csi"] for volume in pod.get("volumes", ()) if "csi" in volume):
            secret = secrets[spec["nodePublishSecretRef"]["name"]]
            yield "inline", spec["volumeAttributes"], (), secret


@pytest.mark.parametrize("name", SETS)
def test_the_plugin_takes_the_volumes_of_the_examples(name: str) -> None:
    attributes = pytest.importorskip("phfs_csi.request.attributes", reason="the plugin is not in this checkout")
    for handle, words, flags, secret in volumes_of(SETS[name]):
        filled = {key: text.replace("CHANGE-ME", "bucket") for key, text in words.items()}
        given = attributes.Given(attributes=filled, secrets=secret, mount_flags=flags)
        assert attributes.parse_volume(handle, given).source.startswith("s3://")


def test_a_volume_moved_from_csi_rclone_is_the_same_volume() -> None:
    attributes = pytest.importorskip("phfs_csi.request.attributes", reason="the plugin is not in this checkout")
    folder = DEPLOY / "examples" / "csi-rclone"
    [(_, old, _, _)], [(_, new, _, _)] = (
        volumes_of(example(folder / name)) for name in ("existing-volume.yaml", "new-volume.yaml")
    )
    assert old == new
    volume = attributes.parse_volume("data-id", attributes.Given(attributes=old))
    assert volume.source == "s3://primehub/"
    assert volume.settings == {"endpoint-url": "http://primehub-minio.hub:9000", "umask": "000"}


# --- the document


def table(title: str) -> set[str]:
    """The words in backquotes of the first column of the first table below a title of docs/csi.md."""
    text = (ROOT / "docs" / "csi.md").read_text().partition(f" {title}\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0], re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def test_every_attribute_is_documented() -> None:
    attributes = pytest.importorskip("phfs_csi.request.attributes", reason="the plugin is not in this checkout")
    assert table("Attributes") == attributes.ATTRIBUTES


def test_every_flag_is_documented() -> None:
    flags = {flag for role in ("node", "controller", "hold") for flag in re.findall(r"--[a-z-]+", plugin_help(role))}
    assert table("Settings of the plugin") == flags - {"--help"}


def test_every_metric_is_documented() -> None:
    metrics = pytest.importorskip("phfs_csi.metrics", reason="the plugin is not in this checkout")
    there = set(re.findall(r'"(phfs_csi_[a-z_]+)"', Path(metrics.__file__).read_text()))
    assert {word.removesuffix("_total") for word in table("Metrics")} == there


def test_every_example_is_documented() -> None:
    text = (ROOT / "docs" / "csi.md").read_text()
    names = {path.relative_to(DEPLOY / "examples").parts[0] for path in EXAMPLES} - {"store-secret.yaml"}
    assert {name for name in names if f"`{name}" not in text} == set()
