"""CSI plugin: mounts prefixes of a bucket into pods through `phfs`."""
