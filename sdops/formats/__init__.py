"""SHELF: containers of tensors. One file is one container.

Each module offers
    sniff(path: Path, head: bytes) -> bool      is this file (first 4 KiB given) or folder mine?
    open(path: Path) -> Source                  headers only; refuses damaged and hostile files
and executes nothing that a file contains.
"""
