"""The chunkwise form as kernels for TPU (``tpu``) and NVIDIA GPUs (``gpu``), with the arguments of ``recurrent``."""
