"""Explanation of one prediction, of a timeline or a note, for people.

Others import explain (the whole way from settings to a record), page, printed and settings, and to
show a record elsewhere words and deletion (sentences).
"""
