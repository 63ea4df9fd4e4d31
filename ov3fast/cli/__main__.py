import sys

from ov3fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
