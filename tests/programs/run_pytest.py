"""`run_pytest.py [ARGUMENT ...]`: pytest, in a process that a test has forked."""

import sys

import pytest

sys.exit(pytest.main(sys.argv[1:]))
