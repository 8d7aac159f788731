"""Limits and use by prefix, and the count of what the store has.

`limits` is asked before each change that needs room and told of each change; it has no await. `counter` keeps the use
right by listing the store now and then.
"""
