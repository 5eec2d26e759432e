"""Evaluation of predictions: figures with intervals by patient, of everybody and of subgroups.

Others import evaluate (the whole way from settings to a record), page, printed, words and
settings.
"""
