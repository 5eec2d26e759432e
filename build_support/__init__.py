"""Builds libclinattn.so, for setup.py and for tests; nothing of this folder is installed.

sources: the files; flags: what each is compiled with; torch_here: torch's headers; toolchain: the
C++ compiler and ccache; cuda: nvcc and the cards; ninja: compiles and links; extension: what
setuptools gets.
"""
