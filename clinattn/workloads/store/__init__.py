"""Timelines on disk: a MEDS folder as a folder of Arrow files that are mapped into memory.

Others import prepare (makes a store), making (its Progress), processes (available ones), reading
(opens a store) and format (tells one from other folders). scan, plan and piece are the two passes.
"""
