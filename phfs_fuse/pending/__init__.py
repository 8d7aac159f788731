"""All that the store does not have yet: dirty files, deleted keys, uploads without an answer, the queue.

No await and no I/O but the journal's: each method is one atomic step, and the journal has it when the method returns.

Begin with `changes`: what follows from each local event.
"""
