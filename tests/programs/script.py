"""
For the programs here of the form `PROGRAM.py SCRIPT.PY [ARGUMENT ...]`: each changes something, and then runs the script as Python
would. Importing this removes the program's own name from sys.argv and puts the script's folder on the path instead of its own.
"""

import os
import runpy
import sys

del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))


def run_script():
    runpy.run_path(sys.argv[0], run_name='__main__')
