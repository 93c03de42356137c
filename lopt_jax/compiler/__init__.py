"""What XLA has to be told: each module names its quirk, what telling it gains, and the switch."""
