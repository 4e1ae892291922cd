"""`other_flags.py TRAIN.PY [FLAG ...]` as on machines with different commands: rank 1 has the flags in EXTRA too."""

import os
import sys

from script import run_script

if os.environ['RANK'] == '1':
    sys.argv += os.environ['EXTRA'].split()
run_script()
