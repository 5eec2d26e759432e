"""The four backends that compute a call, and the choice among them.

Others import call (the record of a call), select (backends, implementation, register), compiled
(the library clinattn._C, where it is there), cpu (instruction_set) and triton (whether its kernels
are interpreted). reference/ is the definition of attention, and computes second derivatives on
every device. backend.py has the records by which select.py knows a backend. Backends never import
each other; only select imports them.
"""
