"""Everything that comes from outside, checked, as frozen values.

Requests, volume attributes (also in csi-rclone's words), secrets and ids. All of it is hostile until it was here.
Owns no state and changes nothing.

Begin with `node_requests` and `params`.
"""
