"""Calibration: trained networks keep what they know, by images without labels."""
