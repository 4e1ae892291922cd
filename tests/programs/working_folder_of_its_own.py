"""Rank 1 works in a folder of its own, where there is no checkpoint."""

import os

from script import run_script

if os.environ['RANK'] == '1':
    os.mkdir('elsewhere')
    os.chdir('elsewhere')
run_script()
