"""`phfs bench`: workloads of a day on phfs and on other mounts of the same store, side by side.

`command` plans and publishes, `run` takes turns, `workloads` over `trial` are what is measured. The programs that are
started are in `systems` and `processes`: the `actor` works in the mount, the `relay` stands before the store.

Begin with `command`.
"""
