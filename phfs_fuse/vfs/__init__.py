"""POSIX calls: directories, files, attributes, open directories, and whether a change may happen.

Each call first asks the store what it needs, then looks at the tree once more, and changes it without an await in
between: no await between the last look at the tree and its change. Errors are `PhfsError`s with their errno.

Begin with `vfs`, then `directories` (create, unlink, rename) and `files` (open, read, write, fsync).
"""
