"""Kernel requests to calls of `vfs`, errors to errno, libfuse's session; the only user of pyfuse3.

Decides nothing. An exception other than FUSEError that leaves a handler would end the mount, so that each handler
turns every error into an errno.

Begin with `ops`: one method a request of the kernel.
"""
