"""Each rank prints the name of the launch that it belongs to: `print_launch_name.py FOLDER`."""

import sys

sys.path.insert(0, sys.argv[1])
import distributed
import errors

distributed.setup('gloo', 60)
print(errors.start)
