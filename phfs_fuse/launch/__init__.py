"""A mount as another process starts, asks and ends it: checks, keeper, client of the control socket.

Used by the commands and by the CSI plugin. Owns no state: a mount is found by its registry record and its config.

Begin with `launcher.start`; `preflight` says what is checked before.
"""
