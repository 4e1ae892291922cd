"""Runs a script in which a member of an enum is pickled as in Python 3.11.2: `enums_of_python_3_11_2.py SCRIPT ...`."""

from enum import Enum

from script import run_script

Enum.__reduce_ex__ = lambda self, proto: (getattr, (self.__class__, self._name_))
run_script()
