"""Prints the checkpoint that the FSDP trainer finds in out/: `find_checkpoint.py FOLDER`."""

import sys

sys.path.insert(0, sys.argv[1])
from sharded_checkpoint import find_checkpoint

print(find_checkpoint('out'))
