"""`phfs bench`: workloads of a day on phfs and on other mounts of the same store, side by side."""
