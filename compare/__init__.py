"""How far two pictures are apart, in numbers and drawn, and what the runs that made them did.

The nodes, the demo and the benchmark measure and draw with this. It needs torch and Pillow, and neither the host nor the core's engine.
"""
