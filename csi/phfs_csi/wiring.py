"""The composition of the node service: every object of it, built from its settings. Owns no state."""

from __future__ import annotations

from phfs_csi.config import NodeConfig
from phfs_csi.handover.lifecycle import Lifecycle
from phfs_csi.node.drains import Drains
from phfs_csi.node.forkserver_client import ForkServer
from phfs_csi.node.mount_configs import MountConfigs
from phfs_csi.node.mounter import PhfsMounter
from phfs_csi.node.records import Records
from phfs_csi.node.shares import Shares
from phfs_csi.node.upkeep import Upkeep
from phfs_csi.node.volumes import Volumes
from phfs_csi.request.node_requests import Requests
from phfs_csi.rpc.node import NodeService


def open_node(config: NodeConfig, requests: Requests) -> NodeService:
    records = Records(config.state_dir / "volumes")
    spawner = ForkServer()
    shares = Shares(config, records)
    configs = MountConfigs(config, records, shares)
    mounter = PhfsMounter(config, configs, shares, spawner)
    drains = Drains(records, configs)
    volumes = Volumes(records, mounter, drains, config.inline_max)
    life = Lifecycle(config, Upkeep(records, mounter, drains, volumes), spawner)
    return NodeService(config, requests, records, mounter, volumes, life)
