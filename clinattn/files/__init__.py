"""Files: disk (written whole or not at all) and shapes (what values of a file must look like).

Imports nothing of the package; any room may import both.
"""
