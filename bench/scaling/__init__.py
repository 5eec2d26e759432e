"""Training on 1, 2, 4 ... processes: run.py measures, worker.py is a process, paper.py predicts.

Nothing imports a command.
"""
