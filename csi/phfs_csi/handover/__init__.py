"""Start and end of the node service: what is taken over from another plugin and left to the next.

Owns who serves when there are two. `holder` is a process of its own that keeps the connections of the mounts; it
loads neither gRPC nor the rest of the plugin, so that this package stays without imports.

Begin with `lifecycle`, then `handover`.
"""
