"""Each rank has an out_dir of its own, as on machines without a common file system: out0, out1, ..."""

import os
import sys

from script import run_script

sys.argv.append(f'--out_dir=out{os.environ["RANK"]}')
run_script()
