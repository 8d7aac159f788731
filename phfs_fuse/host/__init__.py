"""This machine: mount table, mount(2), running mounts, locks, log lines, bytes put aside.

Standard library only: the keeper, the commands and the plugin load it. Nothing here opens or stats a file of a mount,
which might wait for ever.

Begin with `fusemount` and `mount_table`.
"""
