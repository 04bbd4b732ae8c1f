"""The machine: devices, precision, and how it is told to people."""
