"""The run file as typed, torch-free dataclasses. The string under a field is its help (`dskd settings`)."""
