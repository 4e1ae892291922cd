"""Each rank prints the name of its launch: `print_launch_name.py FOLDER`."""

import sys

sys.path.insert(0, sys.argv[1])
import distributed
import torchrun_env

distributed.join_ranks('gloo', 60)
print(torchrun_env.launch_id)
