"""Make `python -m mini_ddpm` run `mini-ddpm`. `accelerate launch -m mini_ddpm train ...` needs it."""

import sys

from mini_ddpm_cli import main

if __name__ == "__main__":
    sys.exit(main())
