"""A run that tortures mounts and proves that nothing was lost: `python -m tests.torture --help`."""
