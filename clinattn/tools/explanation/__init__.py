"""Explanation of one prediction, of a timeline or a note, for people.

Others import explain (the whole way from settings to a record), page, printed and settings.
"""
