"""Gives each rank its own out_dir (out0, out1, ...), as on machines without a shared file system."""

import os
import sys

from script import run_script

sys.argv.append(f'--out_dir=out{os.environ["RANK"]}')
run_script()
