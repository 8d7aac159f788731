"""Settings: the model, the table of options, parsing, JSON.

`options` has one row a setting; `resolve` makes one `MountConfig` of flags, `-o`, variables and file; `model` holds
the limits. The JSON keys of a config are an interface: an older keeper hands its config to a newer worker.

Begin with `model`.
"""
