"""Explanation and evaluation at validation and test end: one session of maps that every callback shares."""
