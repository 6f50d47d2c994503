"""Operations of a model as Triton kernels on a GPU: kernels in kernels.py, `CudaOps` in ops.py."""
