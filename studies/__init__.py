"""What multiplicative interactions are claimed to be good for, tried on small tasks: `python -m studies`."""
