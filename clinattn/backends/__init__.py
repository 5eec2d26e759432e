"""What computes a call: four backends, and the choice among them.

Others import call (what a call consists of), select (backends, implementation, register),
compiled (whether clinattn._C is there) and cpu (instruction_set); reference/ is the definition, and
serves second derivatives on every device. A backend is what backend.py says. Backends never import
each other; select alone imports them.
"""
