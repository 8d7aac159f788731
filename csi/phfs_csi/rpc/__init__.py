"""The gRPC services and their server, the plugin's registration with the kubelet.

Turns requests into frozen values (`request/`) and calls, and errors into status codes: `boundary` is the only place
for that, and for log and counters of calls. No event loop: calls run on a bounded pool of threads.

Begin with `node` and `controller`.
"""
