"""Times of the CPU kernels: run.py and short.py against torch, compare.py against another revision.

run.py and compare.py time the cases of cases.py by the functions of measure.py, short.py a sweep of
its own. Nothing imports a command.
"""
