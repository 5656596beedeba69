"""The layout oracle: every layout against an independent float64 reference."""
