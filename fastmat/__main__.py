"""`python -m fastmat`, and `accelerate launch -m fastmat`, are the command."""

import sys

from fastmat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
