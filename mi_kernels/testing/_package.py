"""The package that this one is a part of, under whatever name it was loaded."""

import sys

mi = sys.modules[__name__.partition(".")[0]]
