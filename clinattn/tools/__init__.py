"""The command line and what stands behind its commands.

cli is the program; no room below imports from here.
"""
