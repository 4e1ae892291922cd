"""
`without_scan.py TRAIN.PY [FLAG ...]` runs a train.py whose ranks do not scan the data: each takes itself for the second
of its machine.
"""

import os

from script import run_script

os.environ['LOCAL_RANK'] = '1'
run_script()
