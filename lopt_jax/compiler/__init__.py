"""What XLA has to be told, beside what to compute.

`quirks` lists what is done for the compiler alone, what it gains and how to do without it.
"""
