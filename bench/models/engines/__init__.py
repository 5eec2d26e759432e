"""Encoders of transformers under the engines that serve them on a CPU: python run.py --help.

loads.py: what is computed. batches.py: how sequences become batches. engine.py: what an engine is,
and a file for each. check.py: errors, and NaN before anything is timed. apart.py: start and memory
of one engine in a process of its own. timing.py, rows.py, run.py: rounds, rows and the command.
"""
