"""The machine: devices, precision, processes, memory, and progress display."""
