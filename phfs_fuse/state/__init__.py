"""What exists on this machine alone: the journal, staging files, room for both on their disk.

Outlives the worker: what was committed is there for the next one, and after a power cut the commits up to some moment
are. Formats stay readable for newer versions. What is damaged is moved aside, never dropped.

Begin with `journal` and its tables in `schema`; `staging` has the bytes.
"""
