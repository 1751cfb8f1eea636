"""Starts the servers of a cluster, without a mount: ``start_servers.py DATA PORT SERVERS COPIES``. They outlive it."""

import sys
from pathlib import Path

from dfsmount import dfs_find, dfs_up
from dfsmount.dfs_layout import Cluster, Layout

layout = Layout(Path(sys.argv[1]))
cluster = Cluster(*map(int, sys.argv[2:]))
layout.prepare()
layout.write_cluster(cluster)
dfs_up.start_servers(layout, cluster, print)
dfs_find.register(cluster.address, layout.data)
