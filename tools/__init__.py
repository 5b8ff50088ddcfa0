"""Commands for developers, which need a checkout: `python tools/NAME.py`. Not in the wheel."""
