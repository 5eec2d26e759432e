"""Times of the CPU kernels: run.py against torch, and compare.py against another revision.

Both time the cases of cases.py by the functions of measure.py. Nothing imports a command.
"""
