"""`python -m peft` is the `peft` command."""

import sys

from peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
