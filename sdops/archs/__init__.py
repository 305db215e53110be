"""SHELF: model families as data. One TOML file is one family (`others.toml`: those that are only named).

`tables.py` says what such a file may contain; `detect.py` recognises a file's components with them, `blocks.py` tells
the merge slot of a key. A family is added by adding a TOML file, without code.
"""
