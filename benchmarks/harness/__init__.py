"""The machinery: what times, checks, records and shows; what is measured is in suites/."""
