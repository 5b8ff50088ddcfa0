import sys

from mi_kernels.cli import main

sys.exit(main())
