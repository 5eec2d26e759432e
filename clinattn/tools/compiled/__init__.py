"""Reports on compiled kernels, without a GPU: registers, shared memory, instructions.

Others import kernel_report, kernel_table (for `clinattn doctor --kernels`) and sass.
"""
