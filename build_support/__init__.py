"""How clinattn._C is built; setup.py calls it, and so do tests, and nothing of it is installed.

sources: the files; flags: what each is compiled with; toolchain: the C++ compiler and ccache;
cuda: nvcc and the cards; ninja: compiles and links; extension: what setuptools gets.
"""
