"""`python -m seqrl.trainer.main_ppo key=value ...`: verl's name for `seqrl train`."""

import sys

from seqrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
