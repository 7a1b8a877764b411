"""What a number is compared with: float64 that is float64 throughout."""
