"""Object stores: the seam (`base`) and what stands behind it."""
