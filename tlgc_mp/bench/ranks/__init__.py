"""Ranks that measure: started, told what to do, and read back."""
