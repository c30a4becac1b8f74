"""Ceph's radosgw from the distribution's packages: one monitor, one OSD that keeps its objects in memory, one gateway.

Linux only. Installing the packages needs root and apt; running what is installed needs neither.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from conformance.server import Processes, Server, Unavailable, free_ports, install, new_credentials
from demo.s3 import HOST

NAME = "radosgw"
PROGRAMS = ("monmaptool", "ceph-mon", "ceph", "ceph-osd", "radosgw", "radosgw-admin")
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
MEMORY_BYTES = 1024**3  # what the objects may take

# Nobody signs anything below the gateway (auth = none), so nothing can be encrypted there either: left to itself, the
# gateway asks the monitor for an encrypted connection, and asks for ever. One OSD means one copy of everything. Sockets
# for administrators are off, because a checkout's path may be longer than a socket's name.
CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = [v2:{host}:{monitor_port}]
public_addr = {host}
cluster_addr = {host}
ms_bind_ipv6 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_mon_cluster_mode = crc
ms_mon_service_mode = crc
admin_socket =
run_dir = {directory}
crash_dir = {directory}
log_to_file = false
log_to_stderr = true
mon_cluster_log_to_file = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0

[mon]
mon_data = {directory}/mon
mon_allow_pool_size_one = true
mon_data_avail_warn = 2
mon_data_avail_crit = 1
paxos_propose_interval = 0.05
paxos_min_wait = 0.01

[osd]
osd_data = {directory}/osd
osd_objectstore = memstore
memstore_device_bytes = {memory_bytes}

[client.rgw]
rgw_data = {directory}/rgw
rgw_frontends = beast endpoint={host}:{port} tcp_nodelay=1
rgw_enable_gc_threads = false
rgw_enable_lc_threads = false
rgw_enable_quota_threads = false
rgw_run_sync_thread = false
"""


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Server]:
    """Install what is missing, and give a server that keeps its files in `directory` and forgets its objects.

    Raises `Unavailable` and `ServerFailed`.
    """
    _install()
    directory = directory / NAME
    shutil.rmtree(directory, ignore_errors=True)
    for name in ("mon", "osd", "rgw"):
        (directory / name).mkdir(parents=True)
    fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
    monitor_port, port = free_ports(2)
    configuration = directory / "ceph.conf"
    configuration.write_text(
        CONFIGURATION.format(
            fsid=fsid, host=HOST, monitor_port=monitor_port, port=port, directory=directory, memory_bytes=MEMORY_BYTES
        )
    )
    at = ("-c", configuration)
    writer, reader = new_credentials(), new_credentials()
    keys = {
        who: (f"--access-key={keys.access_key_id}", f"--secret-key={keys.secret_access_key}")
        for who, keys in {"writer": writer, "reader": reader}.items()
    }
    administer = ("radosgw-admin", *at, "-n", "client.rgw")
    map_of_monitors = directory / "monmap"
    with Processes(directory) as processes:
        processes.run(
            "monmaptool",
            ["monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:{HOST}:{monitor_port}]", map_of_monitors],
        )
        processes.run("mon-mkfs", ["ceph-mon", *at, "-i", "a", "--mkfs", "--monmap", map_of_monitors])
        processes.start("ceph-mon", ["ceph-mon", *at, "-i", "a", "-f"])
        processes.run("osd-new", ["ceph", *at, "--connect-timeout", "30", "osd", "new", osd])
        processes.run("osd-mkfs", ["ceph-osd", *at, "-i", "0", "--mkfs", "--osd-uuid", osd])
        processes.start("ceph-osd", ["ceph-osd", *at, "-i", "0", "-f"])
        processes.run(
            "user", [*administer, "user", "create", "--uid=diskless", "--display-name=Diskless", *keys["writer"]]
        )
        processes.run(
            "reader",
            [*administer, "subuser", "create", "--uid=diskless", "--subuser=diskless:reader", "--access=read",
             "--key-type=s3", *keys["reader"]],
        )  # fmt: skip
        processes.start("radosgw", ["radosgw", *at, "-n", "client.rgw", "-f"])
        server = Server(NAME, _version(), f"http://{HOST}:{port}", writer, reader)
        processes.wait_until_ready(server, make_bucket=True)
        yield server


def _install() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    lacks = f"there is no {missing[0]} on the PATH"
    by_hand = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{lacks}, and no apt-get to install it: install Ceph's radosgw, ceph-mon and ceph-osd")
    if os.geteuid() != 0:
        raise Unavailable(f"{lacks}, and only root may install it: sudo {by_hand}")
    silently = {"DEBIAN_FRONTEND": "noninteractive"}
    install(["apt-get", "update", "--quiet"], Path("/"), silently)
    install(["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *PACKAGES], Path("/"), silently)


def _version() -> str:
    said = subprocess.run(["radosgw", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"version (\d[\w.]*)", said)
    return found[1] if found else said.strip()
