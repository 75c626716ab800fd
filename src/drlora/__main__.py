"""`python -m drlora`: the same as the command `drlora`."""

import sys

from drlora.cli.main import main

sys.exit(main())
