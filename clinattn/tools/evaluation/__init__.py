"""Evaluation of predictions: figures with intervals by patient, of everybody and of subgroups.

Others import evaluate (the whole way from settings to a record), page, printed, words, settings and
predictions (the columns of a file of predictions).
"""
