"""The chunkwise form as kernels for one kind of hardware each, behind the signature of ``chunkwise.chunkwise``."""
