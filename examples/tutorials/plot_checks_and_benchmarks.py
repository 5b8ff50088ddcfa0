"""
Test
====

Text.
"""

print(1)
