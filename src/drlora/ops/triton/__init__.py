"""The engine of Triton kernels; they need a GPU, or Triton's interpreter."""
