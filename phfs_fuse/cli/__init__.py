"""The commands `phfs` and `mount.phfs`: arguments, output, exit codes.

The commands know a mount by its control socket, its config file and the registry alone. They never open a file of
a mount. Modules that take long to load are imported within the function that needs them.

Begin with `main`: one function a command. `program` has what all commands share.
"""
