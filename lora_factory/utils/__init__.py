"""Files, folders and caches that are whole or not there; nothing here knows about models.

In: paths, JSON values and tensors. Out: files that were written by one rename, values that were checked when read.
"""
