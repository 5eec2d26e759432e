"""What computes a call: four backends, and the choice among them.

Others import call (Arguments, what a call consists of), select (backends, implementation) and of a
backend what it tells of this machine: cpu (compiled_module, instruction_set), cuda. reference/ is
the definition. Backends never import each other; only select imports them.
"""
