"""Files: disk (written whole or not at all), shapes (what values of a file must look like), claims.

claims: a folder for one run at a time. Imports nothing of the package; any room may import all.
"""
