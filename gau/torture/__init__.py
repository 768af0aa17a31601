"""A campaign of faults: programs killed at random moments, disks that are full, files cut at random places.

`scripts/torture.py` runs it. Every scene does the same work as an undisturbed one, disturbed, and compares the results.
"""
