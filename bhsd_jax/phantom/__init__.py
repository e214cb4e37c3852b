"""Synthetic head CT: anatomy, bleeds, scanner, and the defects of real data sets."""
